//! The rules of kube-proxy's nftables mode for the service of these tests, in both families, for `nft -f`.

use std::fmt::Write as _;

use crate::stage::{BACKENDS, NODE_PORT, PORT, SERVICE, SNAT_PORTS, backend_addresses};

const CHAIN: &str = "service-SVC1-ns1/svc1/tcp/http";
const EXTERNAL: &str = "external-SVC1-ns1/svc1/tcp/http";

/// The whole ruleset of a node, one transaction.
pub fn ruleset(node: &str) -> String {
    let number = node.trim_start_matches("node");
    let mut text = String::new();
    for (place, (family, kind)) in [("ip", "ipv4_addr"), ("ip6", "ipv6_addr")]
        .into_iter()
        .enumerate()
    {
        let node = [format!("192.168.77.1{number}"), format!("fd00:77::1{number}")];
        let pods = ["10.244.0.0/16", "fd00:10:244::/48"];
        // Writing to a String cannot fail.
        let _ = family_rules(&mut text, family, kind, place, &node[place], pods[place]);
    }
    text
}

#[expect(clippy::too_many_lines, reason = "a ruleset from its first line to its last")]
fn family_rules(
    text: &mut String,
    family: &str,
    kind: &str,
    place: usize,
    node: &str,
    pods: &str,
) -> std::fmt::Result {
    let table = format!("{family} kube-proxy");
    writeln!(text, "add table {table} {{ comment \"rules for kube-proxy\" ; }}")?;
    writeln!(text, "add set {table} cluster-ips {{ type {kind} ; }}")?;
    writeln!(text, "add set {table} nodeport-ips {{ type {kind} ; }}")?;
    writeln!(
        text,
        "add map {table} service-ips {{ type {kind} . inet_proto . inet_service : verdict ; }}"
    )?;
    writeln!(
        text,
        "add map {table} service-nodeports {{ type inet_proto . inet_service : verdict ; }}"
    )?;
    for chain in [
        "mark-for-masquerade",
        "masquerading",
        "services",
        "cluster-ips-check",
        CHAIN,
        EXTERNAL,
    ] {
        writeln!(text, "add chain {table} {chain}")?;
    }
    for (chain, hook, priority) in [
        ("nat-prerouting", "prerouting", -100),
        ("nat-output", "output", -100),
        ("nat-postrouting", "postrouting", 100),
    ] {
        writeln!(
            text,
            "add chain {table} {chain} {{ type nat hook {hook} priority {priority} ; }}"
        )?;
    }
    for hook in ["forward", "output"] {
        writeln!(
            text,
            "add chain {table} filter-{hook} {{ type filter hook {hook} priority 0 ; }}"
        )?;
        writeln!(
            text,
            "add rule {table} filter-{hook} ct state new jump cluster-ips-check"
        )?;
    }
    writeln!(
        text,
        "add rule {table} cluster-ips-check {family} daddr @cluster-ips reject"
    )?;
    writeln!(
        text,
        "add rule {table} mark-for-masquerade mark set mark or 0x4000"
    )?;
    writeln!(text, "add rule {table} masquerading mark and 0x4000 == 0 return")?;
    writeln!(text, "add rule {table} masquerading mark set mark xor 0x4000")?;
    // Only to the ports that the datapath takes for itself: what netfilter has of them must not be taken twice.
    writeln!(
        text,
        "add rule {table} masquerading meta l4proto tcp masquerade to :{SNAT_PORTS} fully-random"
    )?;
    writeln!(text, "add rule {table} nat-output jump services")?;
    writeln!(text, "add rule {table} nat-prerouting jump services")?;
    writeln!(text, "add rule {table} nat-postrouting jump masquerading")?;
    writeln!(
        text,
        "add rule {table} services {family} daddr . meta l4proto . th dport vmap @service-ips"
    )?;
    writeln!(
        text,
        "add rule {table} services {family} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports"
    )?;
    let service = SERVICE[place];
    writeln!(
        text,
        "add rule {table} {CHAIN} {family} daddr {service} {family} saddr != {pods} jump mark-for-masquerade"
    )?;
    let mut choices = Vec::new();
    for (index, _) in BACKENDS.iter().enumerate() {
        let ip = &backend_addresses(index)[place];
        let endpoint = format!("endpoint-{index}");
        let to = if place == 0 {
            format!("{ip}:{PORT}")
        } else {
            format!("[{ip}]:{PORT}")
        };
        writeln!(text, "add chain {table} {endpoint}")?;
        writeln!(
            text,
            "add rule {table} {endpoint} {family} saddr {ip} jump mark-for-masquerade"
        )?;
        writeln!(text, "add rule {table} {endpoint} meta l4proto tcp dnat to {to}")?;
        choices.push(format!("{index} : goto {endpoint}"));
    }
    let choices = choices.join(" , ");
    writeln!(
        text,
        "add rule {table} {CHAIN} numgen random mod {} vmap {{ {choices} }}",
        BACKENDS.len()
    )?;
    writeln!(text, "add rule {table} {EXTERNAL} jump mark-for-masquerade")?;
    writeln!(text, "add rule {table} {EXTERNAL} goto {CHAIN}")?;
    writeln!(text, "add element {table} cluster-ips {{ {service} }}")?;
    writeln!(text, "add element {table} nodeport-ips {{ {node} }}")?;
    writeln!(
        text,
        "add element {table} service-ips {{ {service} . tcp . 80 : goto {CHAIN} }}"
    )?;
    writeln!(
        text,
        "add element {table} service-nodeports {{ tcp . {NODE_PORT} : goto {EXTERNAL} }}"
    )
}
