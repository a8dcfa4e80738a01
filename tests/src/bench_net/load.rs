//! The load: a server that echoes, and a client that counts connections or exchanges. One connection at a time, both
//! ends pinned to one CPU: what is counted is the work of a packet's path, not the wake-up of another CPU.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dataplane_tests::netns;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

/// How long one connection may take before the measurement is given up.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Connect, one byte there and back, reset.
    Connections,
    /// One byte there and back on one connection.
    Exchanges,
}

/// A client in a namespace: a thread that stays there and measures when asked.
#[derive(Debug)]
pub struct Client {
    orders: mpsc::Sender<Order>,
    answers: mpsc::Receiver<Result<f64>>,
}

#[derive(Debug)]
struct Order {
    to: SocketAddrV4,
    measure: Measure,
    during: Duration,
}

/// Starts a server in a namespace; it ends with the process.
pub fn serve(netns: PathBuf, cpu: usize, port: u16) -> Result<()> {
    let (ready, started) = mpsc::channel();
    thread::spawn(move || {
        let listener = settle(&netns, cpu).and_then(|()| {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
                .with_context(|| format!("failed to listen on port {port}"))
        });
        match listener {
            Ok(listener) => {
                let _ = ready.send(Ok(()));
                listener.incoming().flatten().for_each(echo);
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    });
    started.recv().context("the server ended before it listened")?
}

/// Answers until the client is gone, in whatever way it goes.
fn echo(mut stream: TcpStream) {
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}

impl Client {
    /// Starts a client in a namespace.
    pub fn start(netns: PathBuf, cpu: usize) -> Self {
        let (orders, received) = mpsc::channel::<Order>();
        let (answer, answers) = mpsc::channel();
        thread::spawn(move || {
            let settled = settle(&netns, cpu);
            for order in received {
                let result = match &settled {
                    Ok(()) => measure(&order),
                    Err(error) => Err(anyhow::anyhow!("{error:#}")),
                };
                if answer.send(result).is_err() {
                    break;
                }
            }
        });
        Self { orders, answers }
    }

    /// Events a second.
    pub fn measure(&self, to: SocketAddrV4, measure: Measure, during: Duration) -> Result<f64> {
        self.orders
            .send(Order { to, measure, during })
            .context("the client has ended")?;
        self.answers
            .recv()
            .context("the client ended in the middle of a measurement")?
    }
}

fn settle(netns: &Path, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("there is no CPU {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("failed to pin to CPU {cpu}"))?;
    // A thread may change its network namespace; only a process with one thread may change others.
    netns::join(netns)
}

fn measure(order: &Order) -> Result<f64> {
    let Order { to, measure, during } = *order;
    let mut kept = match measure {
        Measure::Connections => None,
        Measure::Exchanges => Some(connect(to)?),
    };
    let started = Instant::now();
    let mut count = 0_u32;
    while started.elapsed() < during {
        match &mut kept {
            Some(stream) => exchange(stream, to)?,
            None => exchange(&mut connect(to)?, to)?,
        }
        count += 1;
    }
    Ok(f64::from(count) / started.elapsed().as_secs_f64())
}

fn connect(to: SocketAddrV4) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).context("failed to open a socket")?;
    // Closing by reset leaves nothing in TIME_WAIT: the client's ports don't run out.
    socket
        .set_linger(Some(Duration::ZERO))
        .context("failed to set linger")?;
    // The send timeout bounds a blocking connect too; a connect with a timeout of its own would cost a poll.
    socket
        .set_write_timeout(Some(PATIENCE))
        .context("failed to set a write timeout")?;
    socket
        .set_read_timeout(Some(PATIENCE))
        .context("failed to set a read timeout")?;
    socket
        .connect(&SocketAddr::V4(to).into())
        .with_context(|| format!("failed to connect to {to}"))?;
    Ok(socket.into())
}

fn exchange(stream: &mut TcpStream, to: SocketAddrV4) -> Result<()> {
    let mut byte = [b'x'];
    stream
        .write_all(&byte)
        .with_context(|| format!("failed to send to {to}"))?;
    match stream.read_exact(&mut byte) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            bail!("{to} did not answer within {PATIENCE:?}")
        }
        Err(error) => Err(error).with_context(|| format!("failed to receive from {to}")),
    }
}
