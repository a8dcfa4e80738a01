//! Two packets of one connection that is about to begin, on two CPUs at the same time: answers of two backends that have got a
//! SYN each, and a client's first acknowledgement with its first data.

use std::hint::spin_loop;
use std::ops::Range;
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
/// Where a frame has its acknowledgement number.
const ACKNOWLEDGED: Range<usize> = 42..46;
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

/// What a program at TC has made of a packet.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    returned: u32,
    to: Ipv4Addr,
}

fn run(object: &Ebpf, name: &str, ifindex: u32, frame: &[u8]) -> Result<Ran> {
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
    let returned = program
        .test_run(options)
        .context("BPF_PROG_TEST_RUN failed")?
        .return_value;
    let [a, b, c, d] = [out[30], out[31], out[32], out[33]];
    Ok(Ran {
        returned,
        to: Ipv4Addr::new(a, b, c, d),
    })
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

/// Runs a program for two packets of each client, by its address and the place of the packet, at the same time.
fn at_once(
    object: &Ebpf,
    name: &str,
    ifindex: u32,
    packet: impl Fn(SocketAddrV4, usize) -> [u8; FRAME] + Sync,
) -> Result<Vec<[Ran; 2]>> {
    let arrived = AtomicU32::new(0);
    let one = |place: usize| {
        let (arrived, packet) = (&arrived, &packet);
        move || -> Result<Vec<Ran>> {
            on_other(place);
            let mut ran = Vec::new();
            for number in 0..CLIENTS {
                let frame = packet(client(number), place);
                arrived.fetch_add(1, Ordering::AcqRel);
                while arrived.load(Ordering::Acquire) < 2 * (u32::from(number) + 1) {
                    spin_loop();
                }
                ran.push(run(object, name, ifindex, &frame)?);
            }
            Ok(ran)
        }
    };
    let [first, second] = thread::scope(|scope| {
        [0, 1]
            .map(|place| scope.spawn(one(place)))
            .map(|thread| thread.join().expect("a thread that sends has panicked"))
    });
    Ok(first?
        .into_iter()
        .zip(second?)
        .map(|(one, other)| [one, other])
        .collect())
}

fn client(number: u16) -> SocketAddrV4 {
    SocketAddrV4::new(CLIENT.into(), FIRST_PORT + number)
}

/// The address of a backend and its port.
fn server(place: usize) -> SocketAddrV4 {
    SocketAddrV4::new(BACKENDS[place], BACKEND_PORT)
}

const FRONTEND: SocketAddrV4 = SocketAddrV4::new(SERVICE, PORT);

/// Works with the object, a device, and the tables; or not at all, in words.
fn with_tables(work: impl FnOnce(&Ebpf, u32, &Filling<'_>) -> Result<()>) -> Result<()> {
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
    work(&object, device.ifindex, &filling)
}

#[test]
fn of_two_backends_that_answer_at_once_the_client_hears_one() -> Result<()> {
    with_tables(|object, ifindex, filling| {
        for place in 0..2 {
            serve(filling, place)?;
            for number in 0..CLIENTS {
                let ran = run(object, "from_pod", ifindex, &frame(client(number), FRONTEND, SYN))?;
                ensure!(ran.returned != SHOT, "the SYN of client {number} was dropped");
            }
        }
        let answer = |client, place| frame(server(place), client, SYN | ACK);
        let answered = at_once(object, "to_pod", ifindex, answer)?;
        let heard = |count| {
            let heard = |of: &[Ran; 2]| of.iter().filter(|ran| ran.returned != SHOT).count();
            answered.iter().filter(|of| heard(of) == count).count()
        };
        ensure!(
            heard(1) == usize::from(CLIENTS),
            "of {CLIENTS} clients {} heard both backends, and {} neither",
            heard(2),
            heard(0)
        );
        let superseded = counted(object, "COUNTERS", Reason::FlowSuperseded as u32)?;
        ensure!(superseded == u64::from(CLIENTS), "{superseded} were counted");
        Ok(())
    })
}

/// The table has changed since the SYN, so a packet without its flow would go elsewhere.
#[test]
fn a_clients_first_acknowledgement_and_data_go_to_one_backend() -> Result<()> {
    with_tables(|object, ifindex, filling| {
        serve(filling, 0)?;
        for number in 0..CLIENTS {
            run(object, "from_pod", ifindex, &frame(client(number), FRONTEND, SYN))?;
            let answer = frame(server(0), client(number), SYN | ACK);
            let ran = run(object, "to_pod", ifindex, &answer)?;
            ensure!(ran.returned != SHOT, "the answer to client {number} was dropped");
        }
        serve(filling, 1)?;
        let acknowledgement = |client, _| {
            let mut frame = frame(client, FRONTEND, ACK);
            frame[ACKNOWLEDGED].copy_from_slice(&1u32.to_be_bytes());
            frame
        };
        let sent = at_once(object, "from_pod", ifindex, acknowledgement)?;
        let astray = sent.iter().flatten().filter(|ran| ran.to != BACKENDS[0]).count();
        ensure!(
            astray == 0,
            "{astray} packets of {CLIENTS} clients went to another backend"
        );
        Ok(())
    })
}
