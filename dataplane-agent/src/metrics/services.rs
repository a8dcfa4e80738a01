//! What goes over single Services, for so many of them; read from the tables when somebody asks.

use std::collections::{BTreeMap, HashMap};

use prometheus::{IntCounterVec, Opts, core::Collector, proto::MetricFamily};

use crate::{
    load::Traffic,
    model::{Kind, Name, ObjectRef},
};

/// What stands in place of the name of a Service that has no series of its own; its namespace is empty.
const OTHER: &str = "other";

/// What has gone over Services since the agent has started, as far as somebody has asked: the tables' own counts begin anew when an
/// index of theirs is given to another Service, and counters never become smaller.
#[derive(Clone, Debug, Default)]
pub struct OverServices {
    /// Of Services that have series of their own.
    own: BTreeMap<Name, Traffic>,
    /// Of all others together.
    other: Traffic,
}

/// Keeps [`OverServices`] up to date.
#[derive(Debug)]
pub struct Counting {
    /// So many Services have series of their own.
    places: usize,
    /// What the tables had counted when somebody asked last, by index. `None`: nobody has.
    seen: Option<Vec<Traffic>>,
    over: OverServices,
}

impl Counting {
    #[must_use]
    pub fn new(places: usize) -> Self {
        Self {
            places,
            seen: None,
            over: OverServices::default(),
        }
    }

    /// Takes in what the tables have counted, by index. `owner`: whose an index is. `exists`: whether there still is a Service.
    ///
    /// Who has series keeps them until the Service is gone. Those that are free go to the Services over which most connections have gone
    /// since they were free.
    pub fn take(
        &mut self,
        counted: Vec<Traffic>,
        owner: impl Fn(u32) -> Option<ObjectRef>,
        exists: impl Fn(&Name) -> bool,
    ) -> &OverServices {
        self.over.own.retain(|name, _| exists(name));
        // What was counted before the first look is not told, but says who gets series.
        let is_first = self.seen.is_none();
        let seen = self.seen.take().unwrap_or_default();
        let mut news: HashMap<Name, Traffic> = HashMap::new();
        for (index, now) in (0..).zip(&counted) {
            let before = seen.get(index as usize).copied().unwrap_or_default();
            let more = since(*now, before);
            if more == Traffic::default() {
                continue;
            }
            match owner(index) {
                Some(ObjectRef {
                    kind: Kind::Service,
                    name,
                }) => *news.entry(name).or_default() += more,
                _ if is_first => {}
                _ => self.over.other += more,
            }
        }
        self.seen = Some(counted);
        self.give_places(&news, &exists);
        let OverServices { own, other } = &mut self.over;
        if !is_first {
            for (name, more) in news {
                *own.get_mut(&name).unwrap_or(other) += more;
            }
        }
        &self.over
    }

    fn give_places(&mut self, news: &HashMap<Name, Traffic>, exists: impl Fn(&Name) -> bool) {
        let own = &mut self.over.own;
        let free = self.places - own.len();
        if free == 0 {
            return;
        }
        // Clients that are not let through are of no less interest.
        let mut without: Vec<(u64, &Name)> = news
            .iter()
            .map(|(name, more)| (more.connections + more.dropped, name))
            .filter(|(tries, name)| *tries > 0 && !own.contains_key(*name) && exists(name))
            .collect();
        without.sort_by(|(many, one), (more, other)| more.cmp(many).then_with(|| one.cmp(other)));
        for (_, name) in without.into_iter().take(free) {
            own.insert(name.clone(), Traffic::default());
        }
    }
}

impl OverServices {
    /// A series for each name, and one for all others.
    #[must_use]
    pub fn families(&self) -> Vec<MetricFamily> {
        let counter = |name: &str, help: &str, more: &[&str]| {
            IntCounterVec::new(
                Opts::new(name, help),
                &[&["service_namespace", "service_name"], more].concat(),
            )
        };
        let counters = [
            counter(
                "dataplane_service_connections_total",
                "Connections, and flows of datagrams, that have begun through a Service, since the agent has started. For so many Services as `--service-metrics` says; `service_name=\"other\"` without a namespace is all others together",
                &[],
            ),
            counter(
                "dataplane_service_refused_connections_total",
                "Those that an endpoint has refused, because nothing listens at its port; `endpoints` shows which",
                &[],
            ),
            counter(
                "dataplane_service_dropped_packets_total",
                "Packets for a Service, and connects, that begin nothing, because this node drops or refuses them: there is no endpoint, the client is in none of the source ranges, a policy of the client's forbids it, or no port is left, for example. In `dataplane_packets_total` too, by reason",
                &[],
            ),
            counter(
                "dataplane_service_packets_total",
                "Packets over a Service, of clients (`direction=\"in\"`) and of endpoints (`out`). An estimate: one packet in 64 is counted, for 64",
                &["direction"],
            ),
            counter(
                "dataplane_service_bytes_total",
                "Bytes over a Service from the IP header on, likewise an estimate",
                &["direction"],
            ),
        ];
        // Names and labels are constants, made by a test.
        let [Ok(connections), Ok(refused), Ok(dropped), Ok(packets), Ok(bytes)] = counters else {
            return Vec::new();
        };
        let own = self
            .own
            .iter()
            .map(|(name, traffic)| (name.namespace(), name.name(), traffic));
        for (namespace, name, traffic) in own.chain([("", OTHER, &self.other)]) {
            let labels = [namespace, name];
            connections.with_label_values(&labels).inc_by(traffic.connections);
            refused.with_label_values(&labels).inc_by(traffic.refused);
            dropped.with_label_values(&labels).inc_by(traffic.dropped);
            for (direction, of_packets, of_bytes) in [
                ("in", traffic.packets_in, traffic.bytes_in),
                ("out", traffic.packets_out, traffic.bytes_out),
            ] {
                let labels = [namespace, name, direction];
                packets.with_label_values(&labels).inc_by(of_packets);
                bytes.with_label_values(&labels).inc_by(of_bytes);
            }
        }
        [
            connections.collect(),
            refused.collect(),
            dropped.collect(),
            packets.collect(),
            bytes.collect(),
        ]
        .concat()
    }
}

/// What was counted in between. Of an index that was given to another Service meanwhile, all that it has.
fn since(now: Traffic, before: Traffic) -> Traffic {
    let Traffic {
        connections,
        refused,
        packets_in,
        bytes_in,
        packets_out,
        bytes_out,
        dropped,
    } = before;
    let more = || {
        Some(Traffic {
            connections: now.connections.checked_sub(connections)?,
            refused: now.refused.checked_sub(refused)?,
            packets_in: now.packets_in.checked_sub(packets_in)?,
            bytes_in: now.bytes_in.checked_sub(bytes_in)?,
            packets_out: now.packets_out.checked_sub(packets_out)?,
            bytes_out: now.bytes_out.checked_sub(bytes_out)?,
            dropped: now.dropped.checked_sub(dropped)?,
        })
    };
    more().unwrap_or(now)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn name(of: &str) -> Name {
        Name::new("shop", of)
    }

    fn traffic(connections: u64) -> Traffic {
        Traffic {
            connections,
            refused: 1,
            dropped: connections * 2,
            bytes_in: connections * 64,
            ..Traffic::default()
        }
    }

    /// By index: `a` has two, `b` and `c` one each, and the last one is nobody's.
    const OWNERS: [&str; 4] = ["a", "a", "b", "c"];

    fn take(over: &mut Counting, connections: &[u64], gone: &str) {
        let counted = connections.iter().copied().map(traffic).collect();
        let owner = |index: u32| {
            let owner = OWNERS.get(index as usize)?;
            Some(ObjectRef::service(&name(owner)))
        };
        over.take(counted, owner, |one| one.name() != gone);
    }

    /// Connections by name.
    fn shown(over: &Counting) -> Vec<(String, u64)> {
        let families = over.over.families();
        let label = |metric: &prometheus::proto::Metric, name: &str| {
            let mut labels = metric.get_label().iter();
            labels
                .find(|label| label.name() == name)
                .unwrap()
                .value()
                .to_owned()
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "small counts"
        )]
        let of = |metric: &prometheus::proto::Metric| {
            (
                label(metric, "service_name"),
                metric.get_counter().get_value() as u64,
            )
        };
        families[0].get_metric().iter().map(of).collect()
    }

    /// Somebody has asked before and since.
    fn counting() -> Counting {
        let mut over = Counting::new(1);
        take(&mut over, &[0], "");
        take(&mut over, &[1, 2, 9, 3], "");
        over
    }

    /// The same, as the page is made of it.
    pub fn over() -> OverServices {
        counting().over
    }

    #[test]
    fn what_was_before_the_first_look_gives_places_and_is_not_told() {
        let mut over = Counting::new(2);
        take(&mut over, &[5, 5, 7, 8, 100], "");
        let zeros = [("other".to_owned(), 0), ("a".to_owned(), 0), ("c".to_owned(), 0)];
        let mut expected = zeros.to_vec();
        expected.sort();
        let mut found = shown(&over);
        found.sort();
        assert_eq!(found, expected, "those with most connections");
        take(&mut over, &[6, 5, 17, 8, 101], "");
        let count = |of: &str| shown(&over).iter().find(|(name, _)| name == of).unwrap().1;
        assert_eq!((count("a"), count("c"), count("other")), (1, 0, 11));
    }

    #[test]
    fn no_counter_becomes_smaller_when_indices_and_places_change_hands() {
        let mut over = counting();
        let count = |over: &Counting, of: &str| {
            let shown = shown(over);
            shown.iter().find(|(name, _)| name == of).map(|(_, count)| *count)
        };
        assert_eq!((count(&over, "b"), count(&over, "other")), (Some(9), Some(6)));
        // A port of `a` is gone, its index is given to nobody yet; then somebody has it who has fewer.
        take(&mut over, &[1, 0, 9, 3], "");
        take(&mut over, &[1, 1, 4, 3], "");
        assert_eq!((count(&over, "b"), count(&over, "other")), (Some(13), Some(7)));
        // `b` is gone: the next one begins with what is new.
        take(&mut over, &[1, 1, 4, 5], "b");
        assert_eq!(
            (count(&over, "b"), count(&over, "c"), count(&over, "other")),
            (None, Some(2), Some(7))
        );
    }

    #[test]
    fn a_service_that_lets_nobody_through_gets_a_place_too() {
        let mut over = Counting::new(1);
        take(&mut over, &[0], "");
        let refused = Traffic {
            dropped: 2,
            ..traffic(0)
        };
        over.take(vec![refused], |_| Some(ObjectRef::service(&name("a"))), |_| true);
        assert_eq!(over.over.own[&name("a")].dropped, 2);
    }

    #[test]
    fn packets_and_bytes_have_a_direction() {
        let page = crate::metrics::Metrics::new().page(None, Some(&over())).unwrap();
        for line in [
            r#"dataplane_service_connections_total{service_name="b",service_namespace="shop"} 9"#,
            r#"dataplane_service_refused_connections_total{service_name="other",service_namespace=""} 2"#,
            r#"dataplane_service_dropped_packets_total{service_name="other",service_namespace=""} 12"#,
            r#"dataplane_service_bytes_total{direction="in",service_name="b",service_namespace="shop"} 576"#,
            r#"dataplane_service_packets_total{direction="out",service_name="b",service_namespace="shop"} 0"#,
        ] {
            assert!(page.lines().any(|one| one == line), "{line} is not in {page}");
        }
    }
}
