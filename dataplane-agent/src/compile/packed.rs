//! [`Compiled`] as it is kept while nothing of it changes: balancers that have the same endpoints have one list of them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{BackendKey, Balancer, Compiled, EndpointInfo, Endpoints};
use crate::model::Packed;

/// What is packed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Parts {
    lists: Vec<Arc<[BackendKey]>>,
    /// Each with the place of its list.
    balancers: Vec<(usize, Balancer)>,
    endpoints: PartsOfEndpoints,
}

#[derive(Debug, Serialize, Deserialize)]
enum PartsOfEndpoints {
    /// The place of their list.
    Plain(usize),
    Listed(Box<[(BackendKey, EndpointInfo)]>),
}

impl Compiled {
    pub fn pack(&self) -> Packed<Parts> {
        let mut lists: Vec<Arc<[BackendKey]>> = Vec::new();
        let mut place_of = |list: &Arc<[BackendKey]>| {
            let known = lists.iter().position(|known| known == list);
            known.unwrap_or_else(|| {
                lists.push(list.clone());
                lists.len() - 1
            })
        };
        let balancers = self.balancers.iter();
        let balancers = balancers
            .map(|balancer| (place_of(&balancer.backends), balancer.clone()))
            .collect();
        let endpoints = match &self.endpoints {
            Endpoints::Plain(list) => PartsOfEndpoints::Plain(place_of(list)),
            Endpoints::Listed(listed) => PartsOfEndpoints::Listed(listed.clone()),
        };
        Packed::new(&Parts {
            lists,
            balancers,
            endpoints,
        })
    }

    pub fn unpack(packed: &Packed<Parts>) -> Self {
        let Parts {
            lists,
            balancers,
            endpoints,
        } = packed.unpack();
        let list = |place: usize| lists.get(place).cloned().unwrap_or_default();
        Self {
            balancers: balancers
                .into_iter()
                .map(|(place, balancer)| Balancer {
                    backends: list(place),
                    ..balancer
                })
                .collect(),
            endpoints: match endpoints {
                PartsOfEndpoints::Plain(place) => Endpoints::Plain(list(place)),
                PartsOfEndpoints::Listed(listed) => Endpoints::Listed(listed),
            },
        }
    }
}
