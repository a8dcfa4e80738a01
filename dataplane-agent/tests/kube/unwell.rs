//! A server that is there and does not do its work: errors, silence, answers that get stuck, refused credentials, connections
//! that break again and again. Meanwhile nothing changes, and afterwards the watches go on where they were. Needs no API server.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    seen::{NODE, Seen},
    unwell_server::{Mood, Unwell},
};

struct Bed {
    server: Unwell,
    dir: TempDir,
}

impl Bed {
    fn start() -> Self {
        let bed = Self {
            server: Unwell::start(),
            dir: tempfile::tempdir().unwrap(),
        };
        bed.apply(1);
        bed.apply(2);
        bed
    }

    fn follow(&self) -> Seen {
        Seen::start(&self.server.kubeconfig(self.dir.path()), &[], NODE)
    }

    fn apply(&self, number: u8) {
        let spec = spec(number);
        self.server.apply("services", "ns", &format!("s{number}"), &spec);
    }

    fn delete(&self, number: u8) {
        self.server.delete("services", "ns", &format!("s{number}"));
    }

    /// While it lasts objects change at the server; nothing of that may show.
    #[track_caller]
    fn during(&self, seen: &mut Seen, time: Duration) {
        self.delete(1);
        self.apply(3);
        let age = |seen: &Seen| seen.report().kinds["Service"].last_event;
        let (before, deleted) = (age(seen), seen.deleted.clone());
        seen.for_a_time(time);
        assert_eq!(seen.deleted, deleted, "nobody has said that anything is gone");
        assert!(seen.is_complete && seen.has("Service ns/s1") && !seen.has("Service ns/s3"));
        assert_eq!(age(seen), before, "`status` shows how old what is known is");
    }

    /// What was missed has come, and it took no second list.
    #[track_caller]
    fn after(&self, seen: &mut Seen) {
        seen.until("what was missed", |seen| {
            seen.has("Service ns/s3") && !seen.has("Service ns/s1")
        });
        assert_eq!(seen.deleted, ["Service ns/s1"]);
        seen.until("all is well", |seen| seen.rejected.is_empty());
        let report = seen.report();
        assert!(report.kinds.values().all(|kind| kind.lists <= 1), "{report:?}");
        assert!(
            report.kinds.values().all(|kind| kind.failing.is_none()),
            "{report:?}"
        );
        self.apply(4);
        seen.until("changes come as ever", |seen| seen.has("Service ns/s4"));
    }
}

fn spec(number: u8) -> Value {
    json!({"clusterIP": format!("10.96.1.{number}"), "ports": [{"port": 80}]})
}

#[test]
fn a_server_in_trouble_is_asked_less_and_less_and_believed_in_nothing() {
    let bed = Bed::start();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.server.be(Mood::Refusing(500, None));
    bed.server.cut();
    let began = Instant::now();
    bed.during(&mut seen, Duration::from_secs(20));
    assert!(seen.says("the API server answers with status 500: out of order"));
    let failing = seen.report().kinds["Service"].failing.clone();
    assert!(failing.unwrap().contains("status 500"), "and so does `status`");
    // Pauses of 0.2 s, 0.4 s and so on, each half to one and a half of that.
    let asked = bed.server.asked("services", began).len();
    assert!((3..=9).contains(&asked), "{asked}");
    bed.server.be(Mood::Well);
    bed.after(&mut seen);
}

#[test]
fn a_server_that_asks_for_patience_gets_it() {
    let bed = Bed::start();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.server.be(Mood::Refusing(429, Some(4)));
    bed.server.cut();
    let began = Instant::now();
    bed.during(&mut seen, Duration::from_secs(15));
    let asked = bed.server.asked("services", began);
    assert!(asked.len() >= 2, "{asked:?}");
    for pair in asked.windows(2) {
        let pause = pair[1].at - pair[0].at;
        assert!(pause >= Duration::from_secs(4), "came back after {pause:?}");
    }
    bed.server.be(Mood::Well);
    bed.after(&mut seen);
}

#[test]
fn a_token_that_expires_is_read_again_and_nothing_is_lost() {
    let bed = Bed::start();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.server.ask_for("second");
    bed.server.cut();
    bed.during(&mut seen, Duration::from_secs(3));
    assert!(seen.says("the API server refuses the agent's credentials: who is that?"));
    fs::write(Unwell::token_file(bed.dir.path()), "second").unwrap();
    bed.after(&mut seen);
}

#[test]
fn a_server_that_is_silent_is_asked_again() {
    without_answers(Mood::Silent);
}

#[test]
fn a_server_that_gets_stuck_is_asked_again() {
    without_answers(Mood::Stuck);
}

fn without_answers(mood: Mood) {
    let bed = Bed::start();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.server.be(mood);
    bed.server.cut();
    bed.during(&mut seen, Duration::from_secs(5));
    seen.until("the silence is told", |seen| seen.says("was silent for 30 s"));
    bed.server.be(Mood::Well);
    bed.after(&mut seen);
}

/// As behind a router that has forgotten the connection: a server says something once a minute, if only how far it is.
#[test]
fn a_watch_that_says_nothing_any_more_is_begun_anew() {
    let bed = Bed::start();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    bed.server.be(Mood::Hushed);
    bed.during(&mut seen, Duration::from_mins(2));
    bed.server.be(Mood::Well);
    bed.after(&mut seen);
}

#[test]
fn a_list_that_comes_slowly_comes_and_a_half_is_none() {
    let bed = Bed::start();
    bed.server.be(Mood::Stuck);
    let mut seen = bed.follow();
    seen.for_a_time(Duration::from_secs(2));
    assert!(!seen.is_complete && seen.objects.is_empty());
    bed.server.be(Mood::Slow(100));
    bed.server.cut();
    seen.until("a slow list", |seen| seen.is_complete);
    assert!(seen.has("Service ns/s1") && seen.has("Service ns/s2"));
    assert!(seen.deleted.is_empty());
}

#[test]
fn connections_that_break_again_and_again_lose_nothing() {
    let bed = Bed::start();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    for number in 10..40 {
        bed.apply(number);
        bed.server.cut();
        seen.for_a_time(Duration::from_millis(300));
    }
    assert!(seen.deleted.is_empty());
    bed.delete(1);
    bed.apply(3);
    bed.after(&mut seen);
    for number in 10..40 {
        assert!(seen.has(&format!("Service ns/s{number}")), "{number}");
    }
}
