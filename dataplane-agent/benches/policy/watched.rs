//! What it costs that somebody watches, and cannot keep up: drops at full speed, told through the ring to the reader of `monitor`.

use std::{
    collections::HashMap,
    io,
    net::SocketAddrV4,
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use dataplane_agent::bpf::events::Watch;
use dataplane_common::reason::Reason;
use dataplane_tests::test_run::{
    Device, SHOT, SYN, Trampoline, Walk, frame, load, on_other,
    tables::{counted, descriptor},
};

use crate::{
    Args, NEW_FLOWS, ROOM, Results,
    crowd::{self, CROWDS, Peers},
    datapath::{Datapath, ON, entries},
    rounds::{Arm, Row, rounds},
};

const GROUP: &str = "watched: drops";
/// With a reader whose ring is always full ÷ without one.
const WATCHED_AT_MOST: f64 = 1.05;
/// As `monitor` looks.
const LOOK: Duration = Duration::from_millis(20);

pub fn watched(args: &Args, device: &Device, results: &mut Results) -> Result<()> {
    if !args.wants(GROUP) {
        return Ok(());
    }
    let compiled = CROWDS[0].compile(Peers::Pods)?;
    let alone = Datapath::load(&args.objects, &compiled, ON, ROOM, device)?;
    let seen = Datapath::load(&args.objects, &compiled, ON, ROOM, device)?;
    let walk = Walk::new(
        frame(SocketAddrV4::new(crowd::NO_PEER, crowd::PORT), SYN),
        NEW_FLOWS,
    );
    let bench = load(&args.objects.join("bench.o"), &entries(1024))?;
    let mut trampoline = Trampoline::new(bench, false, walk, device)?;
    let arms = [Arm::Nothing, Arm::Ours(&alone), Arm::Ours(&seen)];
    for arm in &arms[1..] {
        let (answer, _) = arm.run(&mut trampoline, 1, None)?;
        ensure!(
            answer == SHOT,
            "from_pod returned {answer} for what is to be dropped"
        );
    }
    let dropped = || counted(&seen.object, "COUNTERS", Reason::PolicyDenied as u32);
    let before = dropped()?;
    let names = ["EVENTS", "MONITOR", "COUNTERS", "RULES"];
    let mut found = HashMap::new();
    for name in names {
        found.insert(name, descriptor(&seen.object, name)?);
    }
    let open = |name: &str| {
        found
            .get(name)
            .map_or(Err(io::ErrorKind::NotFound.into()), OwnedFd::try_clone)
    };
    let mut watch = Watch::over(open, None)?;
    let ends = AtomicBool::new(false);
    let (net, told) = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            on_other(args.cpu);
            let mut told = 0u64;
            loop {
                // What is written before the end is taken after it.
                let is_last = ends.load(Ordering::Acquire);
                while watch.take().is_some() {
                    told += 1;
                }
                if is_last {
                    return (told, watch.missed());
                }
                watch.go_on();
                thread::sleep(LOOK);
            }
        });
        let net = rounds(args, &mut trampoline, &arms);
        ends.store(true, Ordering::Release);
        let told = reader.join().unwrap_or_default();
        net.map(|net| (net, told))
    })?;
    let packets = dropped()? - before;
    let (told, missed) = told;
    ensure!(
        packets == args.packets_of_arm() && packets == told + missed,
        "{packets} of {} packets were counted, {told} told and {missed} missed",
        args.packets_of_arm()
    );
    println!("{}", Row::header(GROUP, "alone", "watched"));
    let note = format!("   {told} told, {missed} missed, {packets} counted: exact");
    results.add(Row::of(
        "  full speed".to_owned(),
        NEW_FLOWS,
        net[0].clone(),
        net[1].clone(),
        WATCHED_AT_MOST,
        note,
    ));
    Ok(())
}
