//! What breaks between a source and its server: nothing is lost for long, and nothing is deleted that is there.

use std::{fs, path::Path, process::Command, time::Duration};

use super::seen::{Bed, policy, service};

#[test]
fn a_server_that_breaks_is_followed_again() {
    let Some(mut bed) = Bed::start() else { return };
    for number in 1..=3 {
        bed.apply(&service(&format!("s{number}"), number));
    }
    a_watch_goes_on_after_a_cut(&bed);
    a_server_is_killed_and_comes_back(&mut bed);
    changes_are_missed(&mut bed);
    the_data_is_restored_from_a_backup(&mut bed);
}

fn a_watch_goes_on_after_a_cut(bed: &Bed) {
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.apply(&service("s4", 4));
    seen.until("a change", |seen| seen.has("Service ns/s4"));
    bed.relay.cut();
    bed.apply(&service("s5", 5));
    bed.delete(&service("s4", 4));
    seen.until("changes after the cut", |seen| {
        seen.has("Service ns/s5") && !seen.has("Service ns/s4")
    });
    assert_eq!(seen.deleted, ["Service ns/s4"]);
    let lists = seen.report().kinds["Service"].lists;
    assert_eq!(lists, 1, "a cut is no reason to read everything again");
}

fn a_server_is_killed_and_comes_back(bed: &mut Bed) {
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.server.kill_apiserver();
    seen.until("the loss is told", |seen| seen.says("the API server"));
    assert!(
        seen.is_complete && seen.has("Service ns/s1"),
        "what is known stands"
    );
    bed.server.run().unwrap();
    bed.apply(&service("s6", 6));
    seen.until("a change after the restart", |seen| seen.has("Service ns/s6"));
    seen.until("all is well", |seen| seen.rejected.is_empty());
    assert_eq!(seen.deleted, Vec::<String>::new());
}

/// The server forgets its history while we cannot reach it, so the watch cannot go on: 410 Gone.
fn changes_are_missed(bed: &mut Bed) {
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.relay.close();
    bed.delete(&service("s1", 1));
    for number in 20..40 {
        bed.apply(&service(&format!("s{number}"), number));
    }
    bed.server.kill_apiserver();
    bed.server.run().unwrap();
    seen.until("the loss is told", |seen| seen.says("the API server"));
    assert!(seen.has("Service ns/s1"), "nobody has said that it is gone");
    bed.relay.open();
    seen.until("all that was missed", |seen| {
        seen.has("Service ns/s39") && !seen.has("Service ns/s1")
    });
    seen.until("all is well", |seen| seen.rejected.is_empty());
    assert_eq!(seen.deleted, ["Service ns/s1"]);
}

fn the_data_is_restored_from_a_backup(bed: &mut Bed) {
    bed.server.stop();
    let (data, backup) = (bed.server.data(), bed.server.dir().join("backup"));
    copy(&data, &backup);
    bed.server.run().unwrap();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.delete(&service("s2", 2));
    bed.apply(&service("s50", 50));
    // Versions go far beyond the backup's, so that what the restored server tells next is old news to a naive watch.
    for number in 60..80 {
        bed.apply(&service(&format!("s{number}"), number));
    }
    seen.until("the later state", |seen| {
        seen.has("Service ns/s79") && !seen.has("Service ns/s2")
    });
    bed.server.stop();
    fs::remove_dir_all(&data).unwrap();
    copy(&backup, &data);
    bed.server.run().unwrap();
    seen.until("the restored state", |seen| {
        seen.has("Service ns/s2") && !seen.has("Service ns/s50") && !seen.has("Service ns/s79")
    });
    bed.apply(&service("s51", 51));
    seen.until("a change after the restore", |seen| seen.has("Service ns/s51"));
}

#[test]
fn a_list_that_is_cut_is_no_list() {
    let Some(bed) = Bed::start() else { return };
    // More than a page.
    for number in 0..700 {
        bed.apply(&policy(&format!("p{number}")));
    }
    let kubeconfig = bed.kubeconfig();
    bed.relay.cut_after(150_000);
    let mut seen = super::seen::Seen::start(&kubeconfig, &[], super::seen::NODE);
    seen.until("the loss is told", |seen| !seen.rejected.is_empty());
    seen.for_a_time(Duration::from_secs(1));
    assert!(!seen.is_complete && !seen.has("NetworkPolicy ns/p0"));
    bed.relay.open();
    seen.until("the whole list", |seen| seen.is_complete);
    let policies = seen.objects.keys().filter(|key| key.starts_with("NetworkPolicy"));
    assert_eq!(policies.count(), 700);
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success());
}
