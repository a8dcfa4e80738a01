//! `top` where nobody looks.

use std::process::{Command, Output};

use crate::fake::Agent;

fn top(socket: &std::path::Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dataplane-agent"))
        .args(["top", "--socket"])
        .arg(socket)
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_pipe_gets_plain_tables_after_one_interval() {
    let agent = Agent::start();
    for arguments in [&["--once", "--interval", "100ms"][..], &["--interval", "0.2"]] {
        let output = top(&agent.socket(), arguments);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let web = text.lines().find(|line| line.contains(" shop/web ")).unwrap();
        let words: Vec<&str> = web.split_whitespace().collect();
        assert_eq!(
            words,
            ["shop/web", "210", "0", "19.2k", "1.8M", "33.0M", "0", "3"]
        );
        assert!(
            text.contains("policy-denied") && text.contains("shop/db-0"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}

#[test]
fn no_agent_and_a_wrong_interval_are_said_in_words() {
    let agent = Agent::start();
    agent.stop();
    let output = top(&agent.socket(), &["--once", "--bpffs", "/nonexistent"]);
    assert!(!output.status.success());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("failed to reach an agent at"), "{error}");
    let output = top(&agent.socket(), &["--interval", "0"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("is not from 0.1 to 3600 seconds"), "{error}");
}
