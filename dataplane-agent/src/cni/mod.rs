//! The chained CNI plugin: behind whatever plugin makes a pod's interface, it tells the agent whose that is, and returns when
//! the pod's policies are programmed. Until then the runtime starts none of its processes.
//!
//! It changes nothing itself: the result is that of the plugins before it. CNI specification 1.1.0 and its predecessors.

mod chain;
mod config;
mod error;
mod interface;

use std::{
    env,
    io::{self, Read, Write},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use serde::Deserialize;
use serde_json::{Value, json};

use self::{
    config::{NetworkConfig, PodArgs, WhenAgentDown},
    error::{CniError, Code},
};
use crate::{
    cli::ask::{Answer, ask},
    host::Claim,
};

/// Of the configurations and results that are understood, the newest last.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// How much longer than it was told the agent may take to say no.
const GRACE: Duration = Duration::from_secs(1);

/// What the runtime says in the environment.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub command: String,
    pub netns: String,
    pub ifname: String,
    pub args: String,
}

impl Environment {
    fn read() -> Self {
        let read = |name| env::var(name).unwrap_or_default();
        Self {
            command: read("CNI_COMMAND"),
            netns: read("CNI_NETNS"),
            ifname: read("CNI_IFNAME"),
            args: read("CNI_ARGS"),
        }
    }
}

/// With arguments, what a person or an init container asks for; runtimes give none.
pub fn main() -> ExitCode {
    if env::args_os().len() <= 1 {
        return plugin();
    }
    match chain::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _closed = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs as the runtime asks; an error goes to stdout, as the specification wants it.
fn plugin() -> ExitCode {
    let environment = Environment::read();
    let mut input = String::new();
    let read = io::stdin().read_to_string(&mut input);
    let outcome = match read {
        Ok(_) => run(&environment, &input),
        Err(error) => Err(CniError::new(Code::Io, "failed to read the configuration").because(error)),
    };
    let (text, code) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        // What cannot be deleted now is gone with its interface.
        Err(_) if environment.command == "DEL" => (String::new(), ExitCode::SUCCESS),
        Err(error) => (error.to_json(version_of(&input)), ExitCode::FAILURE),
    };
    // A runtime that has gone needs no answer.
    let _gone = io::stdout().write_all(text.as_bytes());
    code
}

/// The version that a configuration is written in, or the newest.
fn version_of(input: &str) -> &'static str {
    let config: Value = serde_json::from_str(input).unwrap_or_default();
    let version = config.get("cniVersion").and_then(Value::as_str);
    let known = VERSIONS.into_iter().find(|known| Some(*known) == version);
    known.unwrap_or(VERSIONS[VERSIONS.len() - 1])
}

/// What the plugin prints.
pub fn run(environment: &Environment, input: &str) -> Result<String, CniError> {
    match environment.command.as_str() {
        "VERSION" => {
            let version = version_of(input);
            Ok(json!({"cniVersion": version, "supportedVersions": VERSIONS}).to_string())
        }
        "ADD" => {
            let config = NetworkConfig::parse(input)?;
            let result = config.result()?;
            bind(environment, &config)?;
            Ok(result)
        }
        "CHECK" => {
            let config = NetworkConfig::parse(input)?;
            bind(environment, &config)?;
            Ok(String::new())
        }
        "STATUS" => {
            let config = NetworkConfig::parse(input)?;
            status(&config)?;
            Ok(String::new())
        }
        // The agent sees by itself that an interface is gone.
        "DEL" | "GC" => Ok(String::new()),
        other => Err(CniError::new(
            Code::Environment,
            format!("CNI_COMMAND is `{other}`, which is none that there is"),
        )),
    }
}

/// Returns when the agent has programmed the pod's policies.
fn bind(environment: &Environment, config: &NetworkConfig) -> Result<(), CniError> {
    let Some(pod) = PodArgs::parse(&environment.args)? else {
        // A container that is no Pod has no policies.
        return Ok(());
    };
    if environment.netns.is_empty() || environment.ifname.is_empty() {
        return Err(CniError::new(
            Code::Environment,
            "CNI_NETNS or CNI_IFNAME is missing",
        ));
    }
    let interface = interface::find(&environment.netns, &config.host_interfaces())?;
    let claim = Claim {
        ifindex: interface.ifindex,
        namespace: interface.namespace,
        addrs: config.addresses()?,
        uid: pod.uid.clone(),
    };
    let within = config.timeout();
    let path = path(&pod, &claim, within);
    let answer = match ask(&config.agent_socket, &path, within + GRACE) {
        Ok(answer) => answer,
        Err(error) if is_down(&error) && config.when_agent_down == WhenAgentDown::Allow => {
            // On stderr, which runtimes log.
            let _closed = writeln!(
                io::stderr(),
                "dataplane-cni: no agent answers at {}: {} begins without policies",
                config.agent_socket.display(),
                pod.name
            );
            return Ok(());
        }
        Err(error) => return Err(unanswered(config, &error)),
    };
    match answer.status {
        200 => Ok(()),
        504 => Err(CniError::new(
            Code::TryAgainLater,
            format!("policies of {} are not in force yet", pod.name),
        )
        .because(reason(&answer))),
        status => Err(
            CniError::new(Code::Refused, format!("the agent answered with status {status}"))
                .because(reason(&answer)),
        ),
    }
}

/// What the agent is asked, see `health`.
fn path(pod: &PodArgs, claim: &Claim, within: Duration) -> String {
    let Claim {
        ifindex,
        namespace,
        addrs,
        uid,
    } = claim;
    let addrs: Vec<String> = addrs.iter().map(ToString::to_string).collect();
    format!(
        "/bind?pod={}&uid={uid}&ifindex={ifindex}&netns={namespace}&addrs={}&timeout_ms={}",
        pod.name,
        addrs.join(","),
        within.as_millis()
    )
}

fn status(config: &NetworkConfig) -> Result<(), CniError> {
    match ask(&config.agent_socket, "/readyz", config.timeout()) {
        Ok(answer) if answer.status == 200 => Ok(()),
        Ok(_) => Err(CniError::new(
            Code::NotAvailable,
            "the agent has not programmed this node yet",
        )),
        Err(_) if config.when_agent_down == WhenAgentDown::Allow => Ok(()),
        Err(error) => Err(CniError {
            code: Code::NotAvailable,
            ..unanswered(config, &error)
        }),
    }
}

/// Nobody listens at the socket.
fn is_down(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    })
}

fn unanswered(config: &NetworkConfig, error: &anyhow::Error) -> CniError {
    let socket = config.agent_socket.display();
    CniError::new(Code::TryAgainLater, format!("no agent answers at {socket}")).because(format!("{error:#}"))
}

#[derive(Deserialize)]
struct Refusal {
    reason: String,
}

fn reason(answer: &Answer) -> String {
    let refusal: Option<Refusal> = serde_json::from_str(&answer.body).ok();
    refusal.map(|refusal| refusal.reason).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(command: &str) -> Environment {
        Environment {
            command: command.to_owned(),
            netns: "/nonexistent".to_owned(),
            ifname: "eth0".to_owned(),
            args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db-0;K8S_POD_UID=u-1".to_owned(),
        }
    }

    fn config(version: &str) -> String {
        json!({
            "cniVersion": version, "name": "pods", "type": "dataplane-cni", "agentSocket": "/nonexistent/agent.sock",
            "prevResult": {
                "cniVersion": version,
                "interfaces": [
                    {"name": "cni0", "mac": "02:00:00:00:00:01"},
                    {"name": "veth12", "mac": "02:00:00:00:00:02"},
                    {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": "/run/netns/a"},
                ],
                "ips": [{"address": "10.244.1.5/24", "gateway": "10.244.1.1", "interface": 2}, {"address": "fd00::5/64"}],
                "dns": {},
            },
        })
        .to_string()
    }

    #[test]
    fn the_versions_are_told_in_that_of_who_asks() {
        let text = run(&environment("VERSION"), r#"{"cniVersion": "0.4.0"}"#).unwrap();
        let told: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(told["cniVersion"], "0.4.0");
        assert_eq!(told["supportedVersions"], json!(VERSIONS));
        let newest: Value = serde_json::from_str(&run(&environment("VERSION"), "{}").unwrap()).unwrap();
        assert_eq!(newest["cniVersion"], "1.1.0");
    }

    #[test]
    fn the_result_is_that_of_the_plugins_before() {
        // A container that is no Pod: nobody is asked.
        let environment = Environment {
            args: String::new(),
            ..environment("ADD")
        };
        let text = run(&environment, &config("1.0.0")).unwrap();
        let expected: Value = serde_json::from_str(&config("1.0.0")).unwrap();
        let result: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(result, expected["prevResult"]);
    }

    #[test]
    fn what_is_wrong_has_the_specifications_number() {
        let code = |command: &str, input: &str| run(&environment(command), input).unwrap_err().code as u32;
        assert_eq!(code("ADD", "{"), 6);
        assert_eq!(code("ADD", &config("0.2.0")), 1);
        assert_eq!(
            code("ADD", r#"{"cniVersion": "1.0.0", "name": "a"}"#),
            7,
            "not chained"
        );
        assert_eq!(code("ADD", &config("1.0.0")), 5, "no such namespace");
        assert_eq!(code("PLUG", &config("1.0.0")), 4);
        assert_eq!(code("STATUS", &config("1.1.0")), 50);
        let unnamed = config("1.0.0").replace("agentSocket", "agentSokcet");
        assert_eq!(code("ADD", &unnamed), 7, "a key that nobody knows is told");
        let error = run(&environment("ADD"), &config("0.2.0")).unwrap_err();
        let page: Value = serde_json::from_str(&error.to_json("1.0.0")).unwrap();
        assert_eq!((&page["cniVersion"], &page["code"]), (&json!("1.0.0"), &json!(1)));
    }

    #[test]
    fn deleting_needs_nothing() {
        for input in ["", "{", &config("9.9.9")] {
            assert_eq!(run(&environment("DEL"), input).unwrap(), "");
            assert_eq!(run(&environment("GC"), input).unwrap(), "");
        }
    }

    #[test]
    fn the_agent_is_asked_for_the_pod_and_its_interface() {
        let config = NetworkConfig::parse(&config("1.1.0")).unwrap();
        assert_eq!(config.host_interfaces(), ["cni0", "veth12"]);
        let pod = PodArgs::parse(&environment("ADD").args).unwrap().unwrap();
        let claim = Claim {
            ifindex: 12,
            namespace: 3,
            addrs: config.addresses().unwrap(),
            uid: pod.uid.clone(),
        };
        assert_eq!(
            path(&pod, &claim, config.timeout()),
            "/bind?pod=shop/db-0&uid=u-1&ifindex=12&netns=3&addrs=10.244.1.5,fd00::5&timeout_ms=10000"
        );
    }

    #[test]
    fn names_that_no_pod_has_are_refused() {
        for args in [
            "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b c",
            "K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=c",
        ] {
            assert_eq!(PodArgs::parse(args).unwrap_err().code as u32, 4);
        }
        assert!(PodArgs::parse("K8S_POD_NAMESPACE=a").unwrap().is_none());
    }
}
