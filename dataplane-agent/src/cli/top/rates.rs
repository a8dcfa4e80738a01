//! Rates of one interval, from what was counted at its ends.

use std::{collections::HashMap, net::SocketAddr};

use crate::load::{EndpointLoad, Load, Traffic};

/// What happened each second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    pub connections: f64,
    /// Connections that endpoints refused.
    pub refused: f64,
    /// Of clients and of answers.
    pub packets: f64,
    pub bytes_in: f64,
    pub bytes_out: f64,
    /// Of Services and endpoints: what began nothing. Of Pods: at their interface.
    pub drops: f64,
}

impl Rate {
    pub fn bytes(&self) -> f64 {
        self.bytes_in + self.bytes_out
    }

    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    pub fn add(&mut self, other: &Self) {
        let Self {
            connections,
            refused,
            packets,
            bytes_in,
            bytes_out,
            drops,
        } = other;
        self.connections += connections;
        self.refused += refused;
        self.packets += packets;
        self.bytes_in += bytes_in;
        self.bytes_out += bytes_out;
        self.drops += drops;
    }
}

/// The time between two pictures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval(f64);

impl Interval {
    /// `None`: the second is no later than the first.
    pub fn between(before: &Load, now: &Load) -> Option<Self> {
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        (seconds > 0.0).then_some(Self(seconds))
    }

    /// `None` where the number is smaller than before: it was counted anew, and nobody knows since when.
    fn each_second(self, before: u64, now: u64) -> Option<f64> {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a rate of more than 2^53 is not exact, and not there"
        )]
        now.checked_sub(before).map(|more| more as f64 / self.0)
    }

    pub fn rate(self, before: &Traffic, now: &Traffic) -> Option<Rate> {
        let Traffic {
            connections,
            refused,
            packets_in,
            bytes_in,
            packets_out,
            bytes_out,
            dropped,
        } = *now;
        Some(Rate {
            connections: self.each_second(before.connections, connections)?,
            refused: self.each_second(before.refused, refused)?,
            packets: self.each_second(before.packets_in, packets_in)?
                + self.each_second(before.packets_out, packets_out)?,
            bytes_in: self.each_second(before.bytes_in, bytes_in)?,
            bytes_out: self.each_second(before.bytes_out, bytes_out)?,
            drops: self.each_second(before.dropped, dropped)?,
        })
    }

    /// What was dropped. A reason that nobody has met yet begins with nothing.
    pub fn dropped(self, before: u64, now: u64) -> Option<f64> {
        self.each_second(before, now)
    }
}

/// Rates of a picture, by name. Who is not in it has just come, or was counted anew.
#[derive(Clone, Debug, Default)]
pub struct Rates {
    pub services: HashMap<String, Rate>,
    pub pods: HashMap<String, Rate>,
    pub drops: HashMap<String, Rate>,
    /// Of all Services, and of all that was dropped.
    pub total: Rate,
}

impl Rates {
    pub fn between(before: &Load, now: &Load) -> Self {
        let Some(interval) = Interval::between(before, now) else {
            return Self::default();
        };
        let known: HashMap<&str, &Traffic> = before
            .services
            .iter()
            .map(|service| (service.object.as_str(), &service.traffic))
            .collect();
        let services: HashMap<String, Rate> = now
            .services
            .iter()
            .filter_map(|service| {
                let rate = interval.rate(known.get(service.object.as_str())?, &service.traffic)?;
                Some((service.object.clone(), rate))
            })
            .collect();
        let known: HashMap<&str, (&Traffic, u64)> = before
            .pods
            .iter()
            .map(|pod| (pod.pod.as_str(), (&pod.traffic, pod.drops)))
            .collect();
        let pods = now.pods.iter().filter_map(|pod| {
            let (traffic, drops) = known.get(pod.pod.as_str())?;
            let rate = Rate {
                drops: interval.dropped(*drops, pod.drops)?,
                ..interval.rate(traffic, &pod.traffic)?
            };
            Some((pod.pod.clone(), rate))
        });
        let drops: HashMap<String, Rate> = now
            .drops
            .iter()
            .filter_map(|(reason, number)| {
                let before = before.drops.get(reason).copied().unwrap_or(0);
                let drops = interval.dropped(before, *number)?;
                let rate = Rate {
                    drops,
                    ..Rate::default()
                };
                Some((reason.clone(), rate))
            })
            .collect();
        let mut total = Rate::default();
        for rate in services.values() {
            // What was dropped is among the reasons too.
            total.add(&Rate { drops: 0.0, ..*rate });
        }
        for rate in drops.values() {
            total.add(rate);
        }
        Self {
            pods: pods.collect(),
            services,
            drops,
            total,
        }
    }
}

/// Endpoints of a Service, by their addresses.
pub fn of_endpoints<'a>(
    before: &[EndpointLoad],
    now: &'a [EndpointLoad],
    interval: Option<Interval>,
) -> Vec<(String, Option<Rate>, &'a EndpointLoad)> {
    let known: HashMap<(SocketAddr, usize), &Traffic> = numbered(before)
        .map(|(place, endpoint)| ((endpoint.at, place), &endpoint.traffic))
        .collect();
    let rate = |place, endpoint: &EndpointLoad| {
        let before = known.get(&(endpoint.at, place))?;
        interval?.rate(before, &endpoint.traffic)
    };
    numbered(now)
        .map(|(place, endpoint)| {
            let name = match place {
                1 => endpoint.at.to_string(),
                _ => format!("{} ({place})", endpoint.at),
            };
            (name, rate(place, endpoint), endpoint)
        })
        .collect()
}

/// An address may be there for each of two protocols: the first one's, the second one's.
fn numbered(endpoints: &[EndpointLoad]) -> impl Iterator<Item = (usize, &EndpointLoad)> {
    let mut met: HashMap<SocketAddr, usize> = HashMap::new();
    endpoints.iter().map(move |endpoint| {
        let place = met.entry(endpoint.at).or_default();
        *place += 1;
        (*place, endpoint)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::top::tests::canned, load::ServiceLoad};

    #[test]
    fn rates_are_what_was_added_in_a_second() {
        let rates = Rates::between(&canned::load(0), &canned::load(2));
        let db = rates.services["Service shop/db"];
        let expected = [
            (db.connections, 12),
            (db.refused, 2),
            (db.packets, 960),
            (rates.services["Service billing/export"].drops, 2),
            (rates.pods["shop/db-0"].drops, 3),
            (rates.drops["policy-denied"].drops, 3),
            (rates.total.drops, 5),
        ];
        for (rate, number) in expected {
            assert_eq!(rate.to_string(), number.to_string());
        }
        assert!(rates.total.connections > db.connections);
    }

    #[test]
    fn what_was_counted_anew_has_no_rate() {
        let (mut before, mut now) = (canned::load(5), canned::load(6));
        now.services[0].traffic.bytes_out = 1;
        now.drops.insert("policy-denied".to_owned(), 0);
        before.pods.clear();
        let rates = Rates::between(&before, &now);
        let anew = &now.services[0].object;
        assert!(!rates.services.contains_key(anew), "{anew}");
        assert_eq!(rates.services.len(), now.services.len() - 1);
        assert!(rates.pods.is_empty() && !rates.drops.contains_key("policy-denied"));
        // A clock that stands still or goes back.
        for earlier in [6, 5] {
            let rates = Rates::between(&canned::load(6), &canned::load(earlier));
            assert!(rates.services.is_empty() && rates.total.is_zero());
        }
    }

    #[test]
    fn endpoints_of_two_protocols_at_one_address_are_two() {
        let service = |connections: [u64; 2]| ServiceLoad {
            endpoints: connections
                .map(|connections| EndpointLoad {
                    at: "10.244.0.5:53".parse().unwrap(),
                    pod: None,
                    state: "active".to_owned(),
                    traffic: Traffic {
                        connections,
                        ..Traffic::default()
                    },
                })
                .into(),
            ..ServiceLoad::default()
        };
        let interval = Interval::between(&canned::load(0), &canned::load(1));
        let (before, now) = (service([5, 100]), service([6, 109]));
        let rates: Vec<(String, f64)> = of_endpoints(&before.endpoints, &now.endpoints, interval)
            .into_iter()
            .map(|(name, rate, _)| (name, rate.unwrap().connections))
            .collect();
        assert_eq!(
            rates,
            [
                ("10.244.0.5:53".to_owned(), 1.0),
                ("10.244.0.5:53 (2)".to_owned(), 9.0)
            ]
        );
    }
}
