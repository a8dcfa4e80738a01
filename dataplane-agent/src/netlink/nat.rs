//! A table of ours that keeps netfilter translating: without any rule about connections it stops to follow them, and
//! without any chain for NAT to translate them, those under way too. What this table does is to be there.

use std::io;

use super::{
    kube_proxy::has_table,
    socket::{NLM_F_CREATE, RequestSocket, push_attribute},
};

const NFTABLES: u16 = 10 << 8;
/// `enum nf_tables_msg_types`.
const NEW_TABLE: u16 = NFTABLES;
const DELETE_TABLE: u16 = NFTABLES | 2;
const NEW_CHAIN: u16 = NFTABLES | 3;
const NEW_RULE: u16 = NFTABLES | 6;

/// `NFPROTO_INET`: both families.
const INET: u8 = 1;
const TABLE: &[u8] = b"dataplane-takeover\0";
const CHAIN: &[u8] = b"keeps-nat\0";

/// Makes the table, unless it is there.
pub fn keep() -> io::Result<()> {
    /// `NF_INET_POST_ROUTING`, behind everybody else's.
    const HOOK: u32 = 4;
    const PRIORITY: u32 = 300;
    const NFT_REG_1: u32 = 1;
    const NFT_CT_STATE: u32 = 0;

    let mut socket = RequestSocket::open_netfilter()?;
    if has_table(&mut socket, INET, TABLE)? {
        return Ok(());
    }
    let table = message(&[(1, TABLE)]);
    let hook = nested(&[(1, &HOOK.to_be_bytes()), (2, &PRIORITY.to_be_bytes())]);
    let chain = message(&[(1, TABLE), (3, CHAIN), (4 | NESTED, &hook), (7, b"nat\0")]);
    // Loads the connection's state, and does nothing with it.
    let state = nested(&[(1, &NFT_REG_1.to_be_bytes()), (2, &NFT_CT_STATE.to_be_bytes())]);
    let expression = nested(&[(1, b"ct\0"), (2 | NESTED, &state)]);
    let expressions = nested(&[(1 | NESTED, &expression)]);
    let rule = message(&[(1, TABLE), (2, CHAIN), (4 | NESTED, &expressions)]);
    socket.change_all(
        NFTABLES,
        &[
            (NEW_TABLE, NLM_F_CREATE, table),
            (NEW_CHAIN, NLM_F_CREATE, chain),
            (NEW_RULE, NLM_F_CREATE, rule),
        ],
    )
}

/// Removes the table, if it is there.
pub fn release() -> io::Result<()> {
    let mut socket = RequestSocket::open_netfilter()?;
    if has_table(&mut socket, INET, TABLE)? {
        socket.change_all(NFTABLES, &[(DELETE_TABLE, 0, message(&[(1, TABLE)]))])?;
    }
    Ok(())
}

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

fn nested(parts: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, value) in parts {
        push_attribute(&mut body, *kind, value);
    }
    body
}

fn message(parts: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = vec![INET, 0, 0, 0];
    body.extend(nested(parts));
    body
}
