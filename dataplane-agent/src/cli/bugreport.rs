//! `bugreport`: what the other commands say, the agent's last log lines and what the machine is, in one archive.
//!
//! Nothing that it asks knows a token, a key or a password. It does hold names and addresses of Pods, Services and nodes.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, ensure};
use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;

use super::{
    alone::Places,
    ask,
    output::{print, unprinted},
};

/// Our own commands, by the file that each becomes. Each has its way to say that no agent runs, or no tables are pinned.
const COMMANDS: &[(&str, &[&str])] = &[
    ("version.txt", &["--version"]),
    ("status.txt", &["status"]),
    ("status.json", &["status", "-o", "json"]),
    ("services.txt", &["services", "-o", "wide"]),
    ("services.json", &["services", "-o", "json"]),
    ("endpoints.txt", &["endpoints", "-o", "wide"]),
    ("endpoints.json", &["endpoints", "-o", "json"]),
    ("policies.txt", &["policies"]),
    ("policies.json", &["policies", "-o", "json"]),
    ("verdicts.json", &["verdicts", "-o", "json"]),
    ("flows.json", &["flows", "--limit", "0", "-o", "json"]),
    ("top.txt", &["top", "--once"]),
    ("maps.txt", &["maps"]),
    ("maps.json", &["maps", "-o", "json"]),
    ("preflight.txt", &["preflight"]),
    ("preflight.json", &["preflight", "-o", "json"]),
    ("log-levels.txt", &["log"]),
];

/// Of the machine.
const FILES: &[(&str, &str)] = &[
    ("machine/kernel.txt", "/proc/version"),
    ("machine/uptime.txt", "/proc/uptime"),
    ("machine/memory.txt", "/proc/meminfo"),
    ("machine/mounts.txt", "/proc/mounts"),
    ("machine/devices.txt", "/proc/net/dev"),
];

/// Writes the archive to `to`, to stdout where that is `-`, or to a file here that is named after the time; then prints where.
pub fn run(places: Places<'_>, to: Option<PathBuf>) -> anyhow::Result<()> {
    let now = Timestamp::now();
    let folder = format!("dataplane-bugreport-{}", now.strftime("%Y%m%dT%H%M%SZ"));
    if to.as_deref() == Some(Path::new("-")) {
        let stdout = io::stdout();
        ensure!(!stdout.is_terminal(), "an archive is nothing for a terminal");
        return write(stdout.lock(), &folder, now, places)
            .map_err(|error| unprinted(error, "failed to write the archive"));
    }
    let to = to.unwrap_or_else(|| format!("{folder}.tar.gz").into());
    let file = File::create_new(&to).with_context(|| format!("failed to create {}", to.display()))?;
    let written = write(file, &folder, now, places);
    if written.is_err() {
        // Half an archive is of no use.
        let _gone = std::fs::remove_file(&to);
    }
    written.with_context(|| format!("failed to write {}", to.display()))?;
    print(&format!("{}\n", to.display()))
}

fn write(file: impl Write, folder: &str, now: Timestamp, places: Places<'_>) -> anyhow::Result<()> {
    let mut archive = Archive {
        tar: tar::Builder::new(GzEncoder::new(file, Compression::default())),
        folder,
        seconds: now.as_second().unsigned_abs(),
    };
    let own = std::env::current_exe().context("failed to find this program")?;
    for (name, arguments) in COMMANDS {
        let output = Command::new(&own)
            .args(*arguments)
            .env("DATAPLANE_BPFFS", places.bpffs)
            .env("DATAPLANE_SOCKET", places.socket)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .output();
        let output = output.with_context(|| format!("failed to run {}", arguments.join(" ")))?;
        archive.add_output(name, &output)?;
    }
    match ask::reach(places.socket, "/log/lines") {
        Ok(answer) => archive.add("log.txt", answer.body.as_bytes())?,
        Err(error) => archive.add("log.txt.error", format!("{error:#}\n").as_bytes())?,
    }
    for (name, path) in FILES {
        match std::fs::read(path) {
            Ok(bytes) => archive.add(name, &bytes)?,
            Err(error) => archive.add(&format!("{name}.error"), format!("{error}\n").as_bytes())?,
        }
    }
    let encoder = archive.tar.into_inner()?;
    encoder.finish()?.flush()?;
    Ok(())
}

struct Archive<'a, W: Write> {
    tar: tar::Builder<GzEncoder<W>>,
    folder: &'a str,
    /// When it was made, since 1970.
    seconds: u64,
}

impl<W: Write> Archive<'_, W> {
    /// What a command has printed, and what it has complained of.
    fn add_output(&mut self, name: &str, output: &Output) -> io::Result<()> {
        if !output.stdout.is_empty() {
            self.add(name, &output.stdout)?;
        }
        if output.status.success() && output.stderr.is_empty() {
            return Ok(());
        }
        let complaint = [format!("{}\n", output.status).as_bytes(), &output.stderr].concat();
        self.add(&format!("{name}.error"), &complaint)
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.seconds);
        self.tar
            .append_data(&mut header, format!("{}/{name}", self.folder), bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::process::ExitStatusExt as _, process::ExitStatus};

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn what_commands_print_and_complain_of_is_kept_by_name() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a.tar.gz");
        let mut archive = Archive {
            tar: tar::Builder::new(GzEncoder::new(
                File::create(&path).unwrap(),
                Compression::default(),
            )),
            folder: "report",
            seconds: 7,
        };
        let output = |status, stdout: &str, stderr: &str| Output {
            status: ExitStatus::from_raw(status),
            stdout: stdout.into(),
            stderr: stderr.into(),
        };
        archive
            .add_output("a.txt", &output(0, "all is well\n", ""))
            .unwrap();
        archive
            .add_output("b.txt", &output(256, "", "error: nobody\n"))
            .unwrap();
        archive.tar.into_inner().unwrap().finish().unwrap();
        let mut read = tar::Archive::new(GzDecoder::new(File::open(&path).unwrap()));
        let entries = read.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            (entry.path().unwrap().display().to_string(), text)
        });
        let expected = [
            ("report/a.txt", "all is well\n"),
            ("report/b.txt.error", "exit status: 1\nerror: nobody\n"),
        ];
        assert_eq!(
            entries.collect::<Vec<_>>(),
            expected.map(|(name, text)| (name.to_owned(), text.to_owned()))
        );
    }
}
