//! Child processes inside a namespace and a cgroup of the cluster.
//!
//! A child enters both itself, through the helper binary, before it becomes what was asked for: nothing runs between a
//! fork and an exec in this process.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::{cgroup, container, netns};

/// The binary that offers `worker` and `enter`.
#[derive(Debug, Clone)]
pub struct Helper {
    path: PathBuf,
    /// What programs that enter are confined to, where it is not all that this process may do.
    rights: Option<Rights>,
}

/// See [`container::confine`].
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Rights {
    /// Names without `CAP_`
    #[arg(long, value_delimiter = ',', hide = true)]
    pub capabilities: Vec<String>,
    #[arg(long, hide = true)]
    pub writable: Vec<PathBuf>,
}

impl Helper {
    const NAME: &str = "dataplane-scenarios";

    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            rights: None,
        }
    }

    /// Programs that enter get the rights of the chart's container, these capabilities, and no others.
    pub fn confined(self, extra: &[String]) -> Result<Self> {
        let mut capabilities = container::capabilities()?;
        capabilities.extend_from_slice(extra);
        let rights = Some(Rights {
            capabilities,
            writable: Vec::new(),
        });
        Ok(Self { rights, ..self })
    }

    /// Where programs that enter may write, as far as that is not free anyway.
    #[must_use]
    pub fn writing(mut self, folder: &Path) -> Self {
        if let Some(rights) = &mut self.rights {
            rights.writable.push(folder.to_owned());
        }
        self
    }

    /// This program if it is the helper, else the helper that was built beside it.
    pub fn find() -> Result<Self> {
        let own = std::env::current_exe().context("failed to find this program")?;
        if own.file_name() == Some(OsStr::new(Self::NAME)) {
            return Ok(Self::new(own));
        }
        let beside = [
            own.with_file_name(Self::NAME),
            own.parent().unwrap_or(&own).with_file_name(Self::NAME),
        ];
        let found = beside.into_iter().find(|path| path.exists());
        found
            .map(Self::new)
            .with_context(|| format!("{} is not built beside {}", Self::NAME, own.display()))
    }

    /// The helper among the build products that `program` is one of, of either profile.
    pub fn built_with(program: &Path) -> Result<Self> {
        let target = program
            .ancestors()
            .nth(2)
            .context("no folder of build products")?;
        let found = ["debug", "release"].map(|profile| target.join(profile).join(Self::NAME));
        let found = found.into_iter().find(|path| path.exists());
        found
            .map(Self::new)
            .with_context(|| format!("{} is not built", Self::NAME))
    }

    /// A command that runs `program` in a namespace and a cgroup, and dies with the thread that starts it.
    pub fn enter(&self, netns: &Path, cgroup: &Path, program: &Path) -> Command {
        let mut command = self.place("enter", netns, Some(cgroup));
        if let Some(Rights {
            capabilities,
            writable,
        }) = &self.rights
        {
            command.arg("--capabilities").arg(capabilities.join(","));
            for folder in writable {
                command.arg("--writable").arg(folder);
            }
        }
        command.arg("--").arg(program);
        command
    }

    /// A command that runs the worker `name`.
    pub fn worker(&self, name: &str, netns: &Path, cgroup: Option<&Path>) -> Command {
        let mut command = self.place("worker", netns, cgroup);
        command.arg("--name").arg(name);
        command
    }

    fn place(&self, verb: &str, netns: &Path, cgroup: Option<&Path>) -> Command {
        let mut command = Command::new(&self.path);
        command.arg(verb).arg("--netns").arg(netns);
        if let Some(cgroup) = cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        command
    }
}

/// Moves this process, before it has a second thread, to where it shall run.
pub fn settle(netns: &Path, cgroup: Option<&Path>) -> Result<()> {
    if let Some(cgroup) = cgroup {
        cgroup::join(cgroup)?;
    }
    netns::join(netns)
}

/// Becomes another program after [`settle`]. Returns only on failure.
pub fn become_program(command: &[String], rights: &Rights) -> Result<()> {
    if !rights.capabilities.is_empty() {
        container::confine(&rights.capabilities, &rights.writable)?;
    }
    let [program, args @ ..] = command else {
        bail!("no program was named")
    };
    set_pdeathsig(Signal::SIGKILL).context("failed to ask for the parent's death signal")?;
    let error = Command::new(program).args(args).exec();
    Err(anyhow!(error)).with_context(|| format!("failed to run {program}"))
}
