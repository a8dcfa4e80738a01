//! The rules that kube-proxy writes in iptables mode: the same chains, jumps and matches, for `iptables-restore`.

use std::fmt::Write as _;

use crate::fleet::{Fleet, POD_RANGE, SERVICE_PORT, Service};

const FILTER: &str = "\
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

const NAT: &str = "\
*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
";

const NAT_BASE: &str = "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
";

/// Input for `iptables-restore`: it replaces both tables.
pub fn ruleset(fleet: &Fleet) -> String {
    let (mut chains, mut rules) = (String::new(), String::new());
    for (index, service) in fleet.services().enumerate() {
        // Writing to a String cannot fail.
        let _ = add_service(&mut chains, &mut rules, index, &service);
    }
    rules.push_str(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" \
         -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n",
    );
    [FILTER, NAT, &chains, NAT_BASE, &rules, "COMMIT\n"].concat()
}

fn add_service(chains: &mut String, rules: &mut String, index: usize, service: &Service) -> std::fmt::Result {
    let Service {
        name,
        address,
        endpoints,
    } = service;
    // kube-proxy's names end in 16 characters of a hash; a padded number is as long.
    let chain = format!("KUBE-SVC-{index:016}");
    writeln!(chains, ":{chain} - [0:0]")?;
    writeln!(
        rules,
        "-A KUBE-SERVICES -d {address}/32 -p tcp -m comment --comment \"bench/{name}:http cluster IP\" \
         -m tcp --dport {SERVICE_PORT} -j {chain}"
    )?;
    writeln!(
        rules,
        "-A {chain} ! -s {POD_RANGE} -d {address}/32 -p tcp -m comment --comment \"bench/{name}:http cluster IP\" \
         -m tcp --dport {SERVICE_PORT} -j KUBE-MARK-MASQ"
    )?;
    for (nth, (ip, port)) in endpoints.iter().enumerate() {
        let endpoint = format!("KUBE-SEP-{:016}", index * 100 + nth);
        let left = endpoints.len() - nth;
        let choice = if left > 1 {
            format!(
                " -m statistic --mode random --probability 0.{:011}",
                100_000_000_000 / left as u64
            )
        } else {
            String::new()
        };
        writeln!(chains, ":{endpoint} - [0:0]")?;
        writeln!(
            rules,
            "-A {chain} -m comment --comment \"bench/{name}:http -> {ip}:{port}\"{choice} -j {endpoint}"
        )?;
        writeln!(
            rules,
            "-A {endpoint} -s {ip}/32 -m comment --comment \"bench/{name}:http\" -j KUBE-MARK-MASQ"
        )?;
        writeln!(
            rules,
            "-A {endpoint} -p tcp -m comment --comment \"bench/{name}:http\" -m tcp -j DNAT --to-destination {ip}:{port}"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn endpoints_share_what_is_left() {
        let text = ruleset(&Fleet::new(2, (Ipv4Addr::new(10, 244, 1, 3), 7000)));
        assert!(
            text.contains("--probability 0.50000000000 -j KUBE-SEP-0000000000000000\n"),
            "{text}"
        );
        assert!(text.contains("10.244.128.2:8080\" -j KUBE-SEP-0000000000000001\n"));
        assert!(text.contains("-A KUBE-SEP-0000000000000100 -p tcp -m comment --comment \"bench/svc-1:http\" -m tcp -j DNAT --to-destination 10.244.1.3:7000\n"));
    }

    #[test]
    fn every_chain_that_is_jumped_to_is_declared() {
        let text = ruleset(&Fleet::new(3, (Ipv4Addr::new(10, 244, 1, 3), 7000)));
        for target in text
            .lines()
            .filter_map(|line| line.rsplit_once(" -j "))
            .map(|(_, target)| target)
        {
            if target.starts_with("KUBE-") {
                assert!(text.contains(&format!(":{target} - [0:0]")), "{target}");
            }
        }
    }
}
