//! `dataplane-cni install` and `remove`: puts the plugin among a runtime's plugins and behind the others of its list, and takes it
//! out again. For init containers, whose image has nothing else that could copy a file.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

use super::config::{WhenAgentDown, agent_socket, timeout_seconds};

/// The plugin's name, by which lists call it.
const PLUGIN: &str = "dataplane-cni";

#[derive(Debug, Parser)]
#[command(
    name = PLUGIN,
    version,
    about = "A chained CNI plugin; a runtime calls it without arguments"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Copy this program among the plugins, and put it at the end of the first list of configurations.
    Install {
        #[command(flatten)]
        places: Places,
        /// The agent's `--socket`, as the host sees it.
        #[arg(long, default_value_os_t = agent_socket())]
        agent_socket: PathBuf,
        /// What becomes of a Pod while no agent runs.
        #[arg(long, value_enum, default_value = "fail")]
        when_agent_down: WhenAgentDown,
        /// The agent may take so long, in seconds.
        #[arg(long, default_value_t = timeout_seconds())]
        timeout_seconds: u32,
    },
    /// Take it out of every list, and delete the copy.
    Remove {
        #[command(flatten)]
        places: Places,
    },
}

#[derive(Debug, Args)]
struct Places {
    /// The runtime's folder of plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The runtime's folder of configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
}

impl Cli {
    /// Does it, and says on stderr what was done.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Install {
                places,
                agent_socket,
                when_agent_down,
                timeout_seconds,
            } => {
                let entry = json!({
                    "type": PLUGIN,
                    "agentSocket": agent_socket,
                    "whenAgentDown": when_agent_down.as_str(),
                    "timeoutSeconds": timeout_seconds,
                });
                let own = std::env::current_exe().context("failed to find this program")?;
                install(&own, &places, &entry)
            }
            Command::Remove { places } => remove(&places),
        }
    }
}

fn install(program: &Path, places: &Places, entry: &Value) -> anyhow::Result<()> {
    let lists = lists(&places.conf_dir)?;
    let list = lists.first().with_context(|| {
        format!(
            "there is no list of CNI plugins in {}: the network plugin writes it, before this one can be chained",
            places.conf_dir.display()
        )
    })?;
    let program = fs::read(program).with_context(|| format!("failed to read {}", program.display()))?;
    let copy = places.bin_dir.join(PLUGIN);
    // The runtime may be starting the old one.
    replace(&copy, &program, 0o755)?;
    let changed = change(list, |plugins| {
        plugins.retain(|plugin| plugin["type"] != PLUGIN);
        plugins.push(entry.clone());
    })?;
    say(&format!(
        "{} {} in {}",
        copy.display(),
        if changed {
            "is chained now"
        } else {
            "was chained before"
        },
        list.display()
    ));
    Ok(())
}

fn remove(places: &Places) -> anyhow::Result<()> {
    for list in lists(&places.conf_dir)? {
        if change(&list, |plugins| plugins.retain(|plugin| plugin["type"] != PLUGIN))? {
            say(&format!("no more chained in {}", list.display()));
        }
    }
    let copy = places.bin_dir.join(PLUGIN);
    match fs::remove_file(&copy) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", copy.display()))
        }
        _ => Ok(()),
    }
}

/// The lists of a folder, in the order in which runtimes take the first.
fn lists(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))?;
    let mut lists: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "conflist"))
        .collect();
    lists.sort();
    Ok(lists)
}

/// Changes the plugins of a list. False: nothing was different afterwards.
fn change(path: &Path, change: impl FnOnce(&mut Vec<Value>)) -> anyhow::Result<bool> {
    let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    let mut list: Value =
        serde_json::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))?;
    let before = list.clone();
    let plugins = list
        .get_mut("plugins")
        .and_then(Value::as_array_mut)
        .with_context(|| format!("{} has no list of plugins", path.display()))?;
    change(plugins);
    ensure!(
        !plugins.is_empty(),
        "{} has no plugin that makes an interface",
        path.display()
    );
    if list == before {
        return Ok(false);
    }
    let mut text = serde_json::to_string_pretty(&list).context("failed to write JSON")?;
    text.push('\n');
    replace(path, text.as_bytes(), 0o644)?;
    Ok(true)
}

/// Writes a file so that nobody reads half of it.
fn replace(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // No ending that a runtime takes for a configuration.
    let fresh = path.with_extension("dataplane-new");
    let write = || {
        fs::write(&fresh, content)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
        fs::File::open(&fresh)?.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().with_context(|| format!("failed to write {}", path.display()))
}

fn say(text: &str) {
    let _closed = writeln!(std::io::stderr(), "{PLUGIN}: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        r#"{"cniVersion":"0.3.1","name":"pods","plugins":[{"type":"ptp"},{"type":"portmap"}]}"#;

    fn places(folder: &Path) -> Places {
        let places = Places {
            bin_dir: folder.join("bin"),
            conf_dir: folder.join("conf"),
        };
        fs::create_dir(&places.bin_dir).unwrap();
        fs::create_dir(&places.conf_dir).unwrap();
        places
    }

    fn types(path: &Path) -> Vec<String> {
        let list: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let plugins = list["plugins"].as_array().unwrap().iter();
        plugins
            .map(|plugin| plugin["type"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn the_plugin_is_the_last_of_the_first_list_once_and_goes_again() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let (first, second) = (
            places.conf_dir.join("10-a.conflist"),
            places.conf_dir.join("20-b.conflist"),
        );
        fs::write(&first, LIST).unwrap();
        fs::write(&second, LIST).unwrap();
        let program = folder.path().join("program");
        fs::write(&program, "it").unwrap();
        for timeout in [10, 20, 20] {
            let entry = json!({"type": PLUGIN, "timeoutSeconds": timeout});
            install(&program, &places, &entry).unwrap();
            assert_eq!(types(&first), ["ptp", "portmap", PLUGIN]);
            let list: Value = serde_json::from_slice(&fs::read(&first).unwrap()).unwrap();
            assert_eq!(list["plugins"][2]["timeoutSeconds"], timeout);
        }
        assert_eq!(fs::read_to_string(&second).unwrap(), LIST);
        assert_eq!(fs::read(places.bin_dir.join(PLUGIN)).unwrap(), b"it");
        for _ in 0..2 {
            remove(&places).unwrap();
            assert_eq!(types(&first), ["ptp", "portmap"]);
            assert!(!places.bin_dir.join(PLUGIN).exists());
        }
        assert_eq!(fs::read_dir(&places.conf_dir).unwrap().count(), 2);
    }

    #[test]
    fn nothing_is_copied_where_there_is_no_list_and_a_broken_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let entry = json!({"type": PLUGIN});
        let error = install(Path::new("/proc/self/exe"), &places, &entry).unwrap_err();
        assert!(error.to_string().contains("no list of CNI plugins"), "{error}");
        assert!(!places.bin_dir.join(PLUGIN).exists());
        let list = places.conf_dir.join("10-a.conflist");
        for broken in ["{", "{}", r#"{"plugins":[{"type":"dataplane-cni"}]}"#] {
            fs::write(&list, broken).unwrap();
            assert!(remove(&places).is_err(), "{broken}");
            assert_eq!(fs::read_to_string(&list).unwrap(), broken);
        }
    }
}
