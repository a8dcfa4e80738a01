//! A cluster as a folder of manifests, a file for each namespace, and what happens to it.

use std::{
    fs,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::crowd::{self, APPS, Crowd, NAMESPACES};

/// What may happen. Each is done to another place of the cluster in each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    PortOfPolicy,
    PeerOfPolicy,
    RangeOfPolicy,
    PolicyElsewhere,
    PolicyRemoved,
    PolicyAdded,
    LabelHere,
    LabelElsewhere,
    LabelOfNamespace,
    PodElsewhereRemoved,
    PodElsewhereAdded,
    PodHereRemoved,
    PodHereAdded,
    GuardOfCluster,
}

impl Kind {
    pub const ALL: [Self; 14] = [
        Self::PortOfPolicy,
        Self::PeerOfPolicy,
        Self::RangeOfPolicy,
        Self::PolicyElsewhere,
        Self::PolicyRemoved,
        Self::PolicyAdded,
        Self::LabelHere,
        Self::LabelElsewhere,
        Self::LabelOfNamespace,
        Self::PodElsewhereRemoved,
        Self::PodElsewhereAdded,
        Self::PodHereRemoved,
        Self::PodHereAdded,
        Self::GuardOfCluster,
    ];

    pub const fn text(self) -> &'static str {
        match self {
            Self::PortOfPolicy => "a policy of pods here: another port",
            Self::PeerOfPolicy => "a policy of pods here: other peers",
            Self::RangeOfPolicy => "a policy of pods here: another range",
            Self::PolicyElsewhere => "a policy of pods elsewhere",
            Self::PolicyRemoved => "a policy of pods here removed",
            Self::PolicyAdded => "a policy of pods here added",
            Self::LabelHere => "a pod here: another label",
            Self::LabelElsewhere => "a pod elsewhere: another label",
            Self::LabelOfNamespace => "a namespace: another label",
            Self::PodElsewhereRemoved => "a pod elsewhere removed",
            Self::PodElsewhereAdded => "a pod elsewhere added",
            Self::PodHereRemoved => "a pod here removed",
            Self::PodHereAdded => "a pod here added",
            Self::GuardOfCluster => "a policy of the cluster: other peers",
        }
    }
}

/// The folder. Its files have the numbers of the namespaces; the last is of what belongs to none. Nothing of it is kept: this is
/// the process whose memory is measured.
#[derive(Debug)]
pub struct Manifests {
    crowd: Crowd,
    folder: PathBuf,
    /// What is to come back: the file that it was in, and the object.
    removed: Option<(usize, Value)>,
}

impl Manifests {
    /// Writes the folder.
    pub fn write(folder: &Path, crowd: Crowd) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let manifests = Self {
            crowd,
            folder: folder.to_owned(),
            removed: None,
        };
        for number in 0..NAMESPACES {
            manifests.save(number, &crowd.namespace(number))?;
        }
        manifests.save(NAMESPACES, &crowd.of_cluster())?;
        Ok(manifests)
    }

    /// Does one of them.
    pub fn edit(&mut self, kind: Kind, round: usize) -> Result<()> {
        let (namespace, place) = self.pod_here(round);
        let (elsewhere, other) = self.pod_elsewhere(round);
        let app = place % APPS;
        let (ingress, egress) = (crowd::policy_name(app), crowd::policy_name(app + APPS));
        let pod = crowd::pod_name(place);
        let file = match kind {
            Kind::PolicyElsewhere => self.app_elsewhere(round).0,
            Kind::LabelElsewhere | Kind::LabelOfNamespace | Kind::PodElsewhereRemoved => elsewhere,
            Kind::PolicyAdded | Kind::PodElsewhereAdded | Kind::PodHereAdded => {
                self.removed.as_ref().context("nothing was removed")?.0
            }
            Kind::GuardOfCluster => NAMESPACES,
            Kind::PortOfPolicy
            | Kind::PeerOfPolicy
            | Kind::RangeOfPolicy
            | Kind::PolicyRemoved
            | Kind::LabelHere
            | Kind::PodHereRemoved => namespace,
        };
        let mut objects = self.load(file)?;
        let team = |number: usize| json!({"matchLabels": {"team": crowd::team(number)}});
        let any_app = crowd::app_is(round % APPS);
        match kind {
            Kind::PortOfPolicy => {
                find(&mut objects, "NetworkPolicy", &ingress)?["spec"]["ingress"][1]["ports"][0] =
                    json!({"port": 10_000 + round});
            }
            Kind::PeerOfPolicy => {
                let from =
                    json!([{"namespaceSelector": team(round * 3 + round / 100 + 1), "podSelector": any_app}]);
                find(&mut objects, "NetworkPolicy", &ingress)?["spec"]["ingress"][1]["from"] = from;
            }
            Kind::RangeOfPolicy => {
                let to = json!([crowd::block(self.crowd.cidrs + round)]);
                find(&mut objects, "NetworkPolicy", &egress)?["spec"]["egress"][2]["to"] = to;
            }
            Kind::PolicyElsewhere => {
                let name = crowd::policy_name(self.app_elsewhere(round).1);
                find(&mut objects, "NetworkPolicy", &name)?["spec"]["ingress"][1]["ports"][0] =
                    json!({"port": 10_000 + round});
            }
            Kind::LabelHere => label(&mut objects, &pod, round)?,
            Kind::LabelElsewhere => label(&mut objects, &crowd::pod_name(other), round)?,
            Kind::LabelOfNamespace => {
                let name = crowd::namespace_name(elsewhere);
                let team = crowd::team(elsewhere + round % 24 + 1);
                find(&mut objects, "Namespace", &name)?["metadata"]["labels"]["team"] = team.into();
            }
            Kind::PolicyRemoved => {
                self.removed = Some((file, remove(&mut objects, "NetworkPolicy", &ingress)?));
            }
            Kind::PodElsewhereRemoved => {
                let name = crowd::pod_name(other);
                self.removed = Some((file, remove(&mut objects, "Pod", &name)?));
            }
            Kind::PodHereRemoved => {
                self.removed = Some((file, remove(&mut objects, "Pod", &pod)?));
            }
            Kind::PolicyAdded | Kind::PodElsewhereAdded | Kind::PodHereAdded => {
                objects.extend(self.removed.take().map(|(_, object)| object));
            }
            Kind::GuardOfCluster => {
                let name = format!("guard-{}", round % 10);
                let from = json!([{"pods": {"namespaceSelector": team(round), "podSelector": any_app}}]);
                find(&mut objects, "ClusterNetworkPolicy", &name)?["spec"]["ingress"][0]["from"] = from;
            }
        }
        self.save(file, &objects)
    }

    /// The pods of the agent's node that are in the folder, as `namespace/name`.
    pub fn pods_here(&self) -> Vec<String> {
        let removed = self.removed.as_ref().map(|(_, object)| &object["metadata"]);
        let pods = self.places_here().filter_map(|(namespace, place)| {
            let (namespace, name) = (crowd::namespace_name(namespace), crowd::pod_name(place));
            let is_removed = removed.is_some_and(|removed| {
                removed["name"] == name.as_str() && removed["namespace"] == namespace.as_str()
            });
            (!is_removed).then(|| format!("{namespace}/{name}"))
        });
        pods.collect()
    }

    fn load(&self, number: usize) -> Result<Vec<Value>> {
        let path = self.path(number);
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let objects: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
        objects.with_context(|| format!("failed to parse {}", path.display()))
    }

    /// Replaces a file in one step, as tools do that write manifests.
    fn save(&self, number: usize, objects: &[Value]) -> Result<()> {
        let hidden = self.folder.join(".new");
        let mut file = BufWriter::new(fs::File::create(&hidden)?);
        for object in objects {
            writeln!(file, "{object}")?;
        }
        file.flush()?;
        fs::rename(hidden, self.path(number))?;
        Ok(())
    }

    fn path(&self, number: usize) -> PathBuf {
        self.folder.join(format!("{number:03}.json"))
    }

    /// The namespace of a pod of the agent's node, and its place there.
    fn pod_here(&self, round: usize) -> (usize, usize) {
        let here: Vec<(usize, usize)> = self.places_here().collect();
        here[round % here.len()]
    }

    fn places_here(&self) -> impl Iterator<Item = (usize, usize)> {
        let all = (0..NAMESPACES).flat_map(|namespace| self.places(namespace));
        all.filter(|(namespace, place)| self.is_here(*namespace, *place))
    }

    fn pod_elsewhere(&self, round: usize) -> (usize, usize) {
        let namespace = round * 7 % NAMESPACES;
        let mut places = self.places(namespace).skip(round % 50);
        let other = places.find(|(namespace, place)| !self.is_here(*namespace, *place));
        other.unwrap_or((namespace, 0))
    }

    /// An app of which no pod is on the agent's node.
    fn app_elsewhere(&self, round: usize) -> (usize, usize) {
        let namespaces = (0..NAMESPACES).cycle().skip(round % NAMESPACES);
        let mut apps = namespaces.flat_map(|namespace| (0..APPS).map(move |app| (namespace, app)));
        let is_elsewhere = |(namespace, app): &(usize, usize)| {
            let mut places = self.places(*namespace);
            !places.any(|(namespace, place)| place % APPS == *app && self.is_here(namespace, place))
        };
        apps.find(is_elsewhere).unwrap_or_default()
    }

    fn places(&self, namespace: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        (0..self.crowd.pods_of(namespace)).map(move |place| (namespace, place))
    }

    fn is_here(&self, namespace: usize, place: usize) -> bool {
        self.crowd.node_of(namespace, place) == 0
    }
}

/// Gives a pod another app's label.
fn label(objects: &mut [Value], pod: &str, round: usize) -> Result<()> {
    let label = &mut find(objects, "Pod", pod)?["metadata"]["labels"]["app.kubernetes.io/name"];
    let is_known = *label == crowd::app_name(round % APPS);
    *label = crowd::app_name((round + usize::from(is_known)) % APPS).into();
    Ok(())
}

fn find<'a>(objects: &'a mut [Value], kind: &str, name: &str) -> Result<&'a mut Value> {
    let mut found = objects.iter_mut().filter(|object| is(object, kind, name));
    found.next().with_context(|| format!("there is no {kind} {name}"))
}

fn remove(objects: &mut Vec<Value>, kind: &str, name: &str) -> Result<Value> {
    let place = objects.iter().position(|object| is(object, kind, name));
    let place = place.with_context(|| format!("there is no {kind} {name}"))?;
    Ok(objects.remove(place))
}

fn is(object: &Value, kind: &str, name: &str) -> bool {
    object["kind"] == kind && object["metadata"]["name"] == name
}
