//! An emulated machine that boots a kernel with an initramfs of ours: a shell, the kernel's modules for networks, and
//! programs with their libraries at the paths that they have here.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{paths, process, setup};

/// The last line of a machine on which everything passed.
pub const PASSED: &str = "GUEST: passed";

const EMULATOR: &str = "qemu-system-x86_64";
const PACKAGES: [&str; 3] = ["qemu-system-x86", "busybox-static", "cpio"];
/// What is linked to busybox.
const APPLETS: [&str; 12] = [
    "sh", "mount", "ip", "modprobe", "insmod", "poweroff", "sleep", "cat", "ls", "uname", "mkdir", "dmesg",
];
/// Folders and files below `kernel/` whose modules the tests may need, and parts that none of them does.
const MODULES: [&str; 15] = [
    "net/core",
    "net/tls",
    "arch/x86/crypto",
    "net/ipv4",
    "net/ipv6",
    "net/netfilter",
    "net/bridge",
    "net/8021q",
    "net/802",
    "net/llc",
    "net/sched",
    "net/sctp",
    "drivers/net",
    "lib",
    "crypto",
];
const NO_MODULES: [&str; 9] = [
    "net/ethernet",
    "net/wireless",
    "net/usb",
    "net/can",
    "net/wan",
    "net/phy",
    "net/dsa",
    "net/hamradio",
    "net/fddi",
];
/// Loaded at the start; the kernel asks for others itself.
const LOADED: [&str; 13] = [
    "veth",
    "bridge",
    "8021q",
    "bonding",
    "vxlan",
    "wireguard",
    "ipip",
    "sit",
    "sctp",
    "dummy",
    "tun",
    "sch_ingress",
    "cls_bpf",
];

/// Why no machine can be had here, if so; what a package brings is installed where it can be.
pub fn lacking() -> Result<Option<String>> {
    if std::env::consts::ARCH != "x86_64" {
        return Ok(Some("other kernels are tested on x86-64 only".to_owned()));
    }
    for program in ["apt-get", "apt-cache", "dpkg", "ldd"] {
        if paths::program(program).is_none() {
            return Ok(Some(format!(
                "no {program}: kernels come from a distribution of Debian's kind"
            )));
        }
    }
    let missing = || {
        [EMULATOR, "busybox", "cpio"]
            .into_iter()
            .find(|name| paths::program(name).is_none())
    };
    if missing().is_some() {
        setup::packages(&PACKAGES)?;
    }
    Ok(missing().map(|program| format!("no {program}: apt-get install {}", PACKAGES.join(" "))))
}

/// The files of a machine.
#[derive(Debug)]
pub struct Guest {
    root: PathBuf,
}

impl Guest {
    /// A shell and the modules of `kernel`, an unpacked package, in a fresh folder.
    pub fn create(kernel: &Path, root: &Path) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(root).with_context(|| format!("failed to empty {}", root.display()))?;
        }
        let guest = Self {
            root: root.to_path_buf(),
        };
        for dir in ["bin", "sbin", "proc", "sys", "dev", "run", "tmp"] {
            fs::create_dir_all(root.join(dir))
                .with_context(|| format!("failed to create {dir} in {}", root.display()))?;
        }
        let busybox = paths::program("busybox").context("no busybox")?;
        fs::copy(&busybox, root.join("bin/busybox")).context("failed to copy busybox")?;
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet))
                .with_context(|| format!("failed to link {applet}"))?;
        }
        // Where the kernel looks for it.
        symlink("/bin/busybox", root.join("sbin/modprobe")).context("failed to link modprobe")?;
        guest.add_modules(kernel)?;
        Ok(guest)
    }

    fn add_modules(&self, kernel: &Path) -> Result<()> {
        let version = version(kernel)?;
        let from = modules(kernel).join(&version);
        let to = self.root.join("lib/modules").join(&version);
        fs::create_dir_all(&to).with_context(|| format!("failed to create {}", to.display()))?;
        for list in ["modules.builtin", "modules.order"] {
            fs::copy(from.join(list), to.join(list)).with_context(|| format!("failed to copy {list}"))?;
        }
        for folder in MODULES {
            let source = from.join("kernel").join(folder);
            if source.is_dir() {
                copy_modules(&source, &to.join("kernel").join(folder))?;
            }
        }
        process::run_captured(
            Command::new("busybox")
                .args(["depmod", "-b"])
                .arg(&self.root)
                .arg(&version),
        )
    }

    /// A file, at its own path.
    pub fn add_file(&self, path: &Path) -> Result<()> {
        let to = self.inside(path)?;
        fs::copy(path, &to).with_context(|| format!("failed to copy {}", path.display()))?;
        Ok(())
    }

    /// A program without its debug information, and its libraries.
    pub fn add_program(&self, path: &Path) -> Result<()> {
        let to = self.inside(path)?;
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(&to).arg(path);
        if process::run_captured(&mut strip).is_err() {
            self.add_file(path)?;
        }
        for library in process::stdout_of(Command::new("ldd").arg(path))?
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            let library = Path::new(library);
            if !self.inside(library)?.exists() {
                self.add_file(library)?;
            }
        }
        Ok(())
    }

    fn inside(&self, path: &Path) -> Result<PathBuf> {
        let to = self.root.join(path.strip_prefix("/").unwrap_or(path));
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        }
        Ok(to)
    }

    /// The image of a machine that runs `script`, in which `run PROGRAM …` notes a failure.
    pub fn pack(&self, script: &str) -> Result<PathBuf> {
        let modules = LOADED.join(" ");
        let init = format!(
            "#!/bin/sh\nexport PATH=/bin:/sbin\n\
             mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n\
             mount -t bpf bpf /sys/fs/bpf\nmount -t cgroup2 none /sys/fs/cgroup\n\
             cat /proc/version\n\
             for module in {modules}; do modprobe $module || echo lacks the module $module; done\n\
             ip link set lo up\n\
             failed=\nrun() {{ \"$@\" || failed=1; }}\n{script}\n\
             [ -z \"$failed\" ] && echo {PASSED}\npoweroff -f\n"
        );
        let path = self.root.join("init");
        fs::write(&path, init).with_context(|| format!("failed to write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        let image = self.root.with_extension("cpio");
        let mut names = Vec::new();
        list(&self.root, Path::new("."), &mut names)?;
        let file =
            fs::File::create(&image).with_context(|| format!("failed to create {}", image.display()))?;
        let mut cpio = Command::new("cpio")
            .args(["--create", "--format=newc", "--null", "--quiet"])
            .current_dir(&self.root)
            .stdin(Stdio::piped())
            .stdout(file)
            .spawn()
            .context("failed to run cpio")?;
        cpio.stdin
            .take()
            .context("cpio has no input")?
            .write_all(&names)?;
        ensure!(cpio.wait()?.success(), "cpio failed");
        Ok(image)
    }
}

/// Copies modules, unpacked where the package has them packed.
fn copy_modules(from: &Path, to: &Path) -> Result<()> {
    if NO_MODULES.iter().any(|part| from.ends_with(part)) {
        return Ok(());
    }
    fs::create_dir_all(to).with_context(|| format!("failed to create {}", to.display()))?;
    for entry in fs::read_dir(from)
        .with_context(|| format!("failed to list {}", from.display()))?
        .flatten()
    {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_modules(&path, &target)?;
            continue;
        }
        fs::copy(&path, &target).with_context(|| format!("failed to copy {}", path.display()))?;
        if path.extension().is_some_and(|extension| extension == "xz") {
            process::run_captured(Command::new("xz").arg("--decompress").arg(&target))?;
        }
    }
    Ok(())
}

fn list(root: &Path, dir: &Path, names: &mut Vec<u8>) -> Result<()> {
    for entry in fs::read_dir(root.join(dir))?.flatten() {
        let path = dir.join(entry.file_name());
        names.extend(path.as_os_str().as_encoded_bytes());
        names.push(0);
        if entry.file_type()?.is_dir() {
            list(root, &path, names)?;
        }
    }
    Ok(())
}

/// Where an unpacked kernel has its modules: below `usr` since Debian 13.
fn modules(kernel: &Path) -> PathBuf {
    let merged = kernel.join("usr/lib/modules");
    if merged.is_dir() {
        merged
    } else {
        kernel.join("lib/modules")
    }
}

/// The release name of an unpacked kernel.
fn version(kernel: &Path) -> Result<String> {
    let dir = modules(kernel);
    let entry = fs::read_dir(&dir)
        .with_context(|| format!("failed to list {}", dir.display()))?
        .flatten()
        .next();
    let entry = entry.with_context(|| format!("no modules in {}", dir.display()))?;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

/// The bootable image of an unpacked kernel: beside the modules since Debian 14.
fn image_of(kernel: &Path) -> Result<PathBuf> {
    let version = version(kernel)?;
    let image = kernel.join("boot").join(format!("vmlinuz-{version}"));
    if image.is_file() {
        return Ok(image);
    }
    Ok(modules(kernel).join(version).join("vmlinuz"))
}

/// A command that boots a kernel and ends when that powers off or panics.
pub fn machine(kernel: &Path, image: &Path) -> Result<Command> {
    let mut command = Command::new(paths::program(EMULATOR).context("no emulator")?);
    command
        .args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "2048"])
        .args(["-nographic", "-no-reboot", "-net", "none"])
        .arg("-kernel")
        .arg(image_of(kernel)?)
        .arg("-initrd")
        .arg(image)
        // A busy machine emulates too few ticks for the kernel's check of its timer, which then panics.
        .args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"]);
    Ok(command)
}

/// Runs a command to its end, or kills it after `timeout`.
pub fn run_bounded(command: &mut Command, timeout: Duration) -> Result<()> {
    let mut child = command.spawn().context("failed to start the emulator")?;
    let end = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "the emulator failed: {status}");
            return Ok(());
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            bail!("the machine was not done after {timeout:?}");
        }
        sleep(Duration::from_millis(200));
    }
}
