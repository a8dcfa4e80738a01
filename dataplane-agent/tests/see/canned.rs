//! What an agent would tell: the same in tests of `top`, of `ui`, and in the pictures of the documentation. Whoever includes this
//! brings the types.

use std::collections::BTreeMap;

use super::{EndpointLoad, Load, PodLoad, ServiceLoad, Timestamp, Traffic};

/// What goes over one in a second.
#[derive(Clone, Copy)]
struct Pace {
    connections: u64,
    refused: u64,
    dropped: u64,
    packets: [u64; 2],
    bytes: [u64; 2],
}

const REST: Pace = pace(0, 0, 0, 0);

const fn pace(connections: u64, packets: u64, bytes_in: u64, bytes_out: u64) -> Pace {
    Pace {
        connections,
        refused: 0,
        dropped: 0,
        packets: [packets, packets],
        bytes: [bytes_in, bytes_out],
    }
}

impl Pace {
    fn traffic(self, seconds: u64) -> Traffic {
        Traffic {
            connections: self.connections * seconds,
            refused: self.refused * seconds,
            packets_in: self.packets[0] * seconds,
            bytes_in: self.bytes[0] * seconds,
            packets_out: self.packets[1] * seconds,
            bytes_out: self.bytes[1] * seconds,
            dropped: self.dropped * seconds,
        }
    }
}

/// The picture after so many seconds.
pub fn load(seconds: u64) -> Load {
    // It has run for an hour.
    let age = 3600 + seconds;
    let service = |object: &str, pace: Pace, endpoints| ServiceLoad {
        object: object.to_owned(),
        traffic: pace.traffic(age),
        endpoints,
    };
    let endpoint = |at: &str, pod: Option<&str>, state: &str, pace: Pace| EndpointLoad {
        at: at.parse().unwrap(),
        pod: pod.map(str::to_owned),
        state: state.to_owned(),
        traffic: pace.traffic(age),
    };
    let pod = |pod: &str, here, pace: Pace, drops: u64| PodLoad {
        pod: pod.to_owned(),
        here,
        traffic: pace.traffic(age),
        drops: drops * age,
    };
    let (web, db) = (pace(70, 3200, 600_000, 11_000_000), pace(6, 240, 20_000, 155_000));
    // One of its endpoints does not listen everywhere.
    let refusing = |pace| Pace { refused: 2, ..pace };
    let dns = pace(85, 128, 9_600, 21_000);
    Load {
        at: Timestamp::from_second(1_790_000_000 + i64::try_from(seconds).unwrap()).unwrap(),
        services: vec![
            service(
                "Service kube-system/kube-dns",
                dns,
                vec![endpoint(
                    "10.244.2.5:53",
                    Some("kube-system/coredns-0"),
                    "active",
                    dns,
                )],
            ),
            service(
                "Service shop/db",
                refusing(pace(12, 480, 40_000, 310_000)),
                vec![
                    endpoint("10.244.1.21:5432", Some("shop/db-0"), "active", db),
                    endpoint("10.244.2.21:5432", Some("shop/db-1"), "active", refusing(db)),
                ],
            ),
            service("Service shop/idle", REST, Vec::new()),
            service(
                "Service shop/web",
                pace(210, 9600, 1_800_000, 33_000_000),
                vec![
                    endpoint("10.244.1.11:8080", Some("shop/web-0"), "active", web),
                    endpoint("10.244.1.12:8080", Some("shop/web-1"), "active", web),
                    endpoint("10.244.2.11:8080", Some("shop/web-2"), "active", web),
                    endpoint("10.244.2.12:8080", Some("shop/web-3"), "draining", REST),
                ],
            ),
            service(
                "Service billing/export",
                Pace {
                    dropped: 2,
                    ..pace(1, 64, 5_000, 5_000)
                },
                vec![endpoint(
                    "192.0.2.77:443",
                    None,
                    "active",
                    pace(1, 64, 5_000, 5_000),
                )],
            ),
        ],
        pods: vec![
            pod("kube-system/coredns-0", false, dns, 0),
            pod("shop/batch-0", true, REST, 0),
            pod("shop/db-0", true, db, 3),
            pod("shop/db-1", false, refusing(db), 0),
            pod("shop/web-0", true, web, 0),
            pod("shop/web-1", true, web, 0),
            pod("shop/web-2", false, web, 0),
            pod("shop/web-3", false, REST, 0),
        ],
        drops: BTreeMap::from([
            ("source-range".to_owned(), 17),
            ("policy-denied".to_owned(), 3 * age),
            ("no-endpoints".to_owned(), 2 * age),
        ]),
    }
}
