//! Two backends that have got a SYN each of one client, and answer it on two CPUs at the same time.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::programs::{Program, TestRun as _, TestRunOptions};
use dataplane_common::backend::{Backend, BackendHead, backend_state};
use dataplane_common::reason::Reason;
use dataplane_common::service::{Frontend, FrontendKey4, Scope, Service, ServiceHead};
use dataplane_tests::test_run::tables::{Filling, ID, counted};
use dataplane_tests::test_run::{
    self, ACK, BACKEND_PORT, CLIENT, FRAME, PORT, SERVICE, SHOT, SYN, TCP, on_other, word,
};
use nix::sched::{CloneFlags, CpuSet, unshare};
use std::net::{Ipv4Addr, SocketAddrV4};

/// Clients, by their ports from [`FIRST_PORT`] on.
const CLIENTS: u16 = 4000;
const FIRST_PORT: u16 = 2000;
const BACKENDS: [Ipv4Addr; 2] = [test_run::BACKEND, Ipv4Addr::new(10, 9, 0, 3)];
/// Where the table of each backend's own is in `MAGLEV`; the list of its ids is before it.
const TABLES: [u32; 2] = [64, 256];

/// Ethernet, IPv4, TCP.
fn frame(from: SocketAddrV4, to: SocketAddrV4, flags: u8) -> [u8; FRAME] {
    let mut frame = test_run::frame(to, flags);
    frame[26..30].copy_from_slice(&from.ip().octets());
    frame[34..36].copy_from_slice(&from.port().to_be_bytes());
    frame
}

/// What a program at TC returns for a packet.
fn run(object: &Ebpf, name: &str, ifindex: u32, frame: &[u8]) -> Result<u32> {
    let Some(Program::SchedClassifier(program)) = object.program(name) else {
        anyhow::bail!("the object has no program {name}");
    };
    let mut context = [0u32; 48];
    context[10] = ifindex;
    let mut out = [0; 2 * FRAME];
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.data_out = Some(&mut out);
    options.ctx_in = Some(bytemuck::cast_slice(&context));
    Ok(program
        .test_run(options)
        .context("BPF_PROG_TEST_RUN failed")?
        .return_value)
}

/// One service, whose table is the backend's at `place`.
fn serve(filling: &Filling<'_>, place: usize) -> Result<()> {
    let service = Service {
        head: ServiceHead {
            slots_offset: TABLES[place],
            generation: 1,
            size_class: 1,
            flags: 0,
        },
        ..Service::default()
    };
    filling.write("SERVICES", &ID, &service)
}

fn fill(filling: &Filling<'_>) -> Result<()> {
    filling.port()?;
    let key = FrontendKey4 {
        addr_be: word(SERVICE),
        port_be: PORT.to_be(),
        proto: TCP,
        scope: Scope::Internal as u8,
    };
    let frontend = Frontend {
        service: ID,
        owner: 0,
    };
    filling.write("FRONTENDS_V4", &key, &frontend)?;
    for ((backend, id), table) in BACKENDS.iter().zip(ID..).zip(TABLES) {
        let mut addr_be = [0; 4];
        addr_be[0] = word(*backend);
        let value = Backend {
            head: BackendHead {
                generation: 1,
                port_be: BACKEND_PORT.to_be(),
                state: backend_state::ACTIVE,
                flags: 0,
            },
            addr_be,
            ..Backend::default()
        };
        filling.write("BACKENDS", &id, &value)?;
        filling.write("MAGLEV", &(table - 1), &1u64)?;
        filling.write("MAGLEV", &(table - 2), &u64::from(id))?;
    }
    Ok(())
}

/// Has an answer of each backend to each client meet the other's; for each client, how many were dropped.
fn answers_at_once(object: &Ebpf, ifindex: u32) -> Result<Vec<usize>> {
    let arrived = AtomicU32::new(0);
    let answer = |place: usize| {
        let own = place;
        let arrived = &arrived;
        move || -> Result<Vec<bool>> {
            on_other(own);
            let mut dropped = Vec::new();
            for client in 0..CLIENTS {
                let to = SocketAddrV4::new(CLIENT.into(), FIRST_PORT + client);
                let from = SocketAddrV4::new(BACKENDS[place], BACKEND_PORT);
                let frame = frame(from, to, SYN | ACK);
                arrived.fetch_add(1, Ordering::AcqRel);
                while arrived.load(Ordering::Acquire) < 2 * (u32::from(client) + 1) {
                    spin_loop();
                }
                dropped.push(run(object, "to_pod", ifindex, &frame)? == SHOT);
            }
            Ok(dropped)
        }
    };
    let [first, second] = thread::scope(|scope| {
        [0, 1]
            .map(|place| scope.spawn(answer(place)))
            .map(|thread| thread.join().expect("a thread that answers has panicked"))
    });
    let both = first?.into_iter().zip(second?);
    Ok(both
        .map(|(one, other)| usize::from(one) + usize::from(other))
        .collect())
}

#[test]
fn of_two_backends_that_answer_at_once_the_client_hears_one() -> Result<()> {
    let path = crate::object();
    if !nix::unistd::Uid::effective().is_root() || !path.exists() {
        println!("skipped: not root, or no {}", path.display());
        return Ok(());
    }
    if thread::available_parallelism()?.get() < 2 || CpuSet::count() < 2 {
        println!("skipped: there is one CPU");
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNET).context("failed to make a network namespace")?;
    let device = test_run::make_device()?;
    let mut object = test_run::load(&path, &[])?;
    test_run::program(&mut object, "from_pod")?;
    test_run::program(&mut object, "to_pod")?;
    let filling = Filling {
        object: &object,
        older: false,
    };
    fill(&filling)?;
    for place in 0..2 {
        serve(&filling, place)?;
        for client in 0..CLIENTS {
            let from = SocketAddrV4::new(CLIENT.into(), FIRST_PORT + client);
            let frame = frame(from, SocketAddrV4::new(SERVICE, PORT), SYN);
            let answer = run(&object, "from_pod", device.ifindex, &frame)?;
            ensure!(answer != SHOT, "the SYN of client {client} was dropped");
        }
    }
    let dropped = answers_at_once(&object, device.ifindex)?;
    let heard = |count| dropped.iter().filter(|dropped| **dropped == count).count();
    ensure!(
        heard(1) == usize::from(CLIENTS),
        "of {CLIENTS} clients {} heard both backends, and {} neither",
        heard(0),
        heard(2)
    );
    let superseded = counted(&object, "COUNTERS", Reason::FlowSuperseded as u32)?;
    ensure!(superseded == u64::from(CLIENTS), "{superseded} were counted");
    Ok(())
}
