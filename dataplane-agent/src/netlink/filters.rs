//! TC filters of a clsact qdisc, for kernels without TCX. Priority and handle are fixed, so attaching again replaces.

use std::io;

use super::socket::{
    Message, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, RequestSocket, attributes, push_attribute, read_string,
    read_u32,
};
use crate::bpf::{Hook, Program};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;

const TCMSG_LEN: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// `TC_H_CLSACT` and the handle of a clsact qdisc.
const CLSACT_PARENT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `ETH_P_ALL`, network byte order.
const ALL_PROTOCOLS_BE: u16 = 0x0003_u16.to_be();
/// The first that there is, so that nobody's filter runs before ours unless it shares the priority.
const PRIORITY: u32 = 1;
const HANDLE: u32 = 0xd1;
/// Begins the name of our filters.
pub const NAME_PREFIX: &str = "dataplane:";

/// A BPF filter of any owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub name: String,
    pub prog_id: u32,
    pub priority: u16,
    pub handle: u32,
}

impl Filter {
    /// Our program that this filter runs, if it is ours.
    pub fn program(&self) -> Option<Program> {
        self.name.strip_prefix(NAME_PREFIX).and_then(Program::by_symbol)
    }
}

fn tcmsg(ifindex: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    for word in [ifindex, handle, parent, info] {
        body.extend(word.to_ne_bytes());
    }
    body
}

fn parent(hook: Hook) -> u32 {
    if hook == Hook::TcIngress {
        0xffff_fff2
    } else {
        0xffff_fff3
    }
}

fn filter_message(ifindex: u32, hook: Hook) -> Vec<u8> {
    tcmsg(
        ifindex,
        HANDLE,
        parent(hook),
        PRIORITY << 16 | u32::from(ALL_PROTOCOLS_BE),
    )
}

/// Makes sure that the device has a clsact qdisc; returns whether it was made.
pub fn ensure_clsact(socket: &mut RequestSocket, ifindex: u32) -> io::Result<bool> {
    let mut body = tcmsg(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0);
    push_attribute(&mut body, TCA_KIND, b"clsact\0");
    match socket.change(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &body) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the device has a clsact qdisc.
pub fn has_clsact(socket: &mut RequestSocket, ifindex: u32) -> io::Result<bool> {
    let qdiscs = socket.dump(RTM_GETQDISC, &tcmsg(ifindex, 0, 0, 0))?;
    Ok(qdiscs.iter().any(|qdisc| {
        read_u32(&qdisc.body, 4) == Some(ifindex)
            && attributes(qdisc.body.get(TCMSG_LEN..).unwrap_or_default())
                .any(|(kind, value)| kind == TCA_KIND && read_string(value) == "clsact")
    }))
}

/// Adds or replaces our filter.
pub fn put(socket: &mut RequestSocket, ifindex: u32, program: Program, prog_fd: u32) -> io::Result<()> {
    let mut options = Vec::new();
    push_attribute(&mut options, TCA_BPF_FD, &prog_fd.to_ne_bytes());
    push_attribute(
        &mut options,
        TCA_BPF_NAME,
        format!("{NAME_PREFIX}{}\0", program.symbol()).as_bytes(),
    );
    push_attribute(
        &mut options,
        TCA_BPF_FLAGS,
        &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes(),
    );
    let mut body = filter_message(ifindex, program.hook());
    push_attribute(&mut body, TCA_KIND, b"bpf\0");
    push_attribute(&mut body, TCA_OPTIONS, &options);
    socket.change(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, &body)
}

/// Removes our filter; success when it is not there.
pub fn remove(socket: &mut RequestSocket, ifindex: u32, hook: Hook) -> io::Result<()> {
    let mut body = filter_message(ifindex, hook);
    push_attribute(&mut body, TCA_KIND, b"bpf\0");
    ignore_missing(socket.change(RTM_DELTFILTER, 0, &body))
}

/// The BPF filters of a device in the order in which they run.
pub fn list(socket: &mut RequestSocket, ifindex: u32, hook: Hook) -> io::Result<Vec<Filter>> {
    let messages = dump(socket, ifindex, hook)?;
    Ok(messages
        .iter()
        .filter_map(|message| parse(&message.body))
        .collect())
}

/// Removes the device's clsact qdisc unless it holds filters that are not ours, of any kind. Ours must be gone.
pub fn remove_unused_clsact(socket: &mut RequestSocket, ifindex: u32) -> io::Result<()> {
    for hook in [Hook::TcIngress, Hook::TcEgress] {
        // The kernel lists each priority once more, without a filter.
        let is_filter = |message: &Message| read_u32(&message.body, 8).is_some_and(|handle| handle != 0);
        if dump(socket, ifindex, hook)?.iter().any(is_filter) {
            return Ok(());
        }
    }
    ignore_missing(socket.change(RTM_DELQDISC, 0, &tcmsg(ifindex, CLSACT_HANDLE, CLSACT_PARENT, 0)))
}

fn dump(socket: &mut RequestSocket, ifindex: u32, hook: Hook) -> io::Result<Vec<Message>> {
    match socket.dump(RTM_GETTFILTER, &tcmsg(ifindex, 0, parent(hook), 0)) {
        Ok(messages) => Ok(messages),
        // No clsact qdisc there.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse(body: &[u8]) -> Option<Filter> {
    let handle = read_u32(body, 8)?;
    let priority = (read_u32(body, 16)? >> 16) as u16;
    let mut filter = Filter {
        name: String::new(),
        prog_id: 0,
        priority,
        handle,
    };
    let mut is_bpf = false;
    for (kind, value) in attributes(body.get(TCMSG_LEN..)?) {
        match kind {
            TCA_KIND => is_bpf = read_string(value) == "bpf",
            TCA_OPTIONS => {
                for (kind, value) in attributes(value) {
                    match kind {
                        TCA_BPF_NAME => filter.name = read_string(value),
                        TCA_BPF_ID => filter.prog_id = read_u32(value, 0)?,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // The kernel lists each priority once more, without a filter.
    (is_bpf && handle != 0).then_some(filter)
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}
