//! The ruleset that kube-proxy writes in nftables mode: the same tables, hooks, maps, chains and rules, for `nft -f`.

use std::fmt::Write as _;

use crate::fleet::{Fleet, POD_RANGE, SERVICE_PORT, SERVICE_RANGE, Service};

/// Sets, maps, base chains and the rules in them: what is there whatever the services are.
const BASE: &str = "\
add table ip kube-proxy { comment \"rules for kube-proxy\" ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy cluster-ips-check ip daddr { SERVICE_RANGE } drop
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
";

/// The whole ruleset, one transaction. It replaces the one before it.
pub fn ruleset(fleet: &Fleet) -> String {
    let mut text = String::from("add table ip kube-proxy\ndelete table ip kube-proxy\n");
    text.push_str(&BASE.replace("SERVICE_RANGE", SERVICE_RANGE));
    for service in fleet.services() {
        // Writing to a String cannot fail.
        let _ = add_service(&mut text, &service);
    }
    text
}

fn add_service(text: &mut String, service: &Service) -> std::fmt::Result {
    let Service {
        name,
        address,
        endpoints,
    } = service;
    let chain = format!("service-{name}/tcp/http");
    let endpoint_chains: Vec<String> = endpoints
        .iter()
        .map(|(ip, port)| format!("endpoint-{name}/tcp/http__{ip}/{port}"))
        .collect();
    for ((ip, port), endpoint) in endpoints.iter().zip(&endpoint_chains) {
        writeln!(text, "add chain ip kube-proxy {endpoint}")?;
        writeln!(
            text,
            "add rule ip kube-proxy {endpoint} ip saddr {ip} jump mark-for-masquerade"
        )?;
        writeln!(
            text,
            "add rule ip kube-proxy {endpoint} meta l4proto tcp dnat to {ip}:{port}"
        )?;
    }
    let choices: Vec<String> = endpoint_chains
        .iter()
        .enumerate()
        .map(|(index, endpoint)| format!("{index} : goto {endpoint}"))
        .collect();
    writeln!(text, "add chain ip kube-proxy {chain}")?;
    writeln!(
        text,
        "add rule ip kube-proxy {chain} ip daddr {address} ip saddr != {POD_RANGE} jump mark-for-masquerade"
    )?;
    writeln!(
        text,
        "add rule ip kube-proxy {chain} numgen random mod {} vmap {{ {} }}",
        choices.len(),
        choices.join(" , ")
    )?;
    writeln!(text, "add element ip kube-proxy cluster-ips {{ {address} }}")?;
    writeln!(
        text,
        "add element ip kube-proxy service-ips {{ {address} . tcp . {SERVICE_PORT} : goto {chain} }}"
    )
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_service_is_reached_through_the_verdict_map() {
        let text = ruleset(&Fleet::new(1, (Ipv4Addr::new(10, 244, 1, 3), 7000)));
        for line in [
            "add element ip kube-proxy service-ips { 10.96.1.0 . tcp . 80 : goto service-svc-0/tcp/http }",
            "add rule ip kube-proxy service-svc-0/tcp/http numgen random mod 1 vmap { 0 : goto endpoint-svc-0/tcp/http__10.244.1.3/7000 }",
            "add rule ip kube-proxy endpoint-svc-0/tcp/http__10.244.1.3/7000 meta l4proto tcp dnat to 10.244.1.3:7000",
        ] {
            assert!(text.lines().any(|each| each == line), "{line} is missing");
        }
    }
}
