//! A container's view of the machine: a mount namespace with a root of its own, a host name, a user without
//! rights. One shell script makes it and then becomes the container's program, so that the process that was
//! started is the container.
//!
//! The root is a small tmpfs into which the machine's `/usr/bin`, `/usr/lib` and the like are bound read-only,
//! with the image's programs and the pod's volumes at their places. As root, the user, group, capabilities and
//! read-only root of the security context hold; otherwise a user namespace gives what it can. Limits of
//! processor and memory, network policies and seccomp profiles are not enforced.

use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// Folders of the machine that every container sees, read-only.
const SYSTEM_FOLDERS: [&str; 7] =
    ["/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/share", "/etc/ssl"];
/// Files of the machine that name resolution and user names need.
const SYSTEM_FILES: [&str; 6] =
    ["/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/ld.so.cache"];
/// Where an image's programs are found.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// The root holds folders and small files alone.
const ROOT_MIB: u32 = 64;

/// A folder or file at a place in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// On this machine.
    pub source: PathBuf,
    /// In the container.
    pub target: PathBuf,
    /// Whether the container may not write it.
    pub read_only: bool,
}

/// The user that a container runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// User and group id.
    pub id: Option<(u32, u32)>,
    /// Further groups.
    pub groups: Vec<u32>,
    /// All capabilities are dropped.
    pub drop_capabilities: bool,
    /// Programs may not gain rights.
    pub no_new_privileges: bool,
    /// The root may not be written.
    pub read_only_root: bool,
}

/// What a container runs, and where.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// The empty folder that becomes its root.
    pub root: PathBuf,
    /// The host name.
    pub hostname: String,
    /// Volumes and programs.
    pub mounts: Vec<Mount>,
    /// Whom it runs as.
    pub user: User,
    /// The working folder.
    pub folder: PathBuf,
    /// The whole environment.
    pub environment: Vec<(String, String)>,
    /// The program and its arguments.
    pub command: Vec<String>,
}

/// Whether this process may mount and change users.
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

impl Sandbox {
    /// The command that makes the sandbox and becomes the program.
    pub fn command(&self) -> Command {
        let mut command = Command::new("/usr/bin/unshare");
        command.args(["--mount", "--uts"]);
        if !is_root() {
            command.arg("--map-root-user");
        }
        command.args(["/bin/sh", "-euc", &self.script()]);
        command
    }

    /// A command inside of the running container, as `kubectl exec` would start it.
    pub fn enter(&self, process: u32, command: &[String]) -> Command {
        let mut enter = Command::new("/usr/bin/nsenter");
        enter.args(["--mount", "--uts", "--root", "--target", &process.to_string()]);
        if !is_root() {
            enter.args(["--user", "--preserve-credentials"]);
        }
        enter.args(["/bin/sh", "-euc", &format!("exec {}", self.privileges(command))]);
        enter
    }

    fn script(&self) -> String {
        let mut script = String::new();
        let root = quoted(&self.root.to_string_lossy());
        let mut line = |text: String| writeln!(script, "{text}").expect("a String takes any text");
        line(format!("hostname {}", quoted(&self.hostname)));
        line(format!("mount -t tmpfs -o size={ROOT_MIB}m,mode=0755 tmpfs {root}"));
        line(format!("cd {root}"));
        line("mkdir -p usr/local/bin proc dev sys etc tmp run var/tmp root && chmod 1777 tmp var/tmp".into());
        line("ln -s usr/bin bin && ln -s usr/sbin sbin && ln -s usr/lib lib && ln -s usr/lib64 lib64".into());
        line("for d in proc dev sys; do mount --rbind /$d $d; done".into());
        for folder in SYSTEM_FOLDERS.iter().filter(|folder| Path::new(folder).is_dir()) {
            line(format!("mkdir -p .{folder} && mount --bind -o ro {folder} .{folder}"));
        }
        for file in SYSTEM_FILES.iter().filter(|file| Path::new(file).is_file()) {
            line(format!("touch .{file} && mount --bind -o ro {file} .{file}"));
        }
        for mount in &self.mounts {
            line(mount.line());
        }
        if self.user.read_only_root {
            line(format!("mount -o remount,ro {root}"));
        }
        line(format!("exec chroot {root} {}", self.privileges(&self.command)));
        script
    }

    /// The words that give up rights, set the environment and the folder, and become the program. The
    /// parent-death signal is set again: giving up rights clears it.
    fn privileges(&self, command: &[String]) -> String {
        let mut words = vec!["/usr/bin/setpriv".to_owned(), "--pdeathsig".into(), "KILL".into()];
        if self.user.no_new_privileges {
            words.push("--no-new-privs".into());
        }
        if let Some((user, group)) = self.user.id.filter(|_| is_root()) {
            words.extend(["--reuid".into(), user.to_string(), "--regid".into(), group.to_string()]);
            let groups: Vec<String> = self.user.groups.iter().map(u32::to_string).collect();
            if groups.is_empty() {
                words.push("--clear-groups".into());
            } else {
                words.extend(["--groups".into(), groups.join(",")]);
            }
        }
        if self.user.drop_capabilities {
            words.extend(["--inh-caps=-all".into(), "--bounding-set=-all".into()]);
        }
        words.extend(["/usr/bin/env".into(), "-i".into(), "-C".into(), self.folder.display().to_string()]);
        if !self.environment.iter().any(|(name, _)| name == "PATH") {
            words.push(format!("PATH={PATH}"));
        }
        words.extend(self.environment.iter().map(|(name, value)| format!("{name}={value}")));
        words.extend(command.iter().cloned());
        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

impl Mount {
    /// The shell line that binds it below the current folder.
    fn line(&self) -> String {
        let (source, target) = (self.source.to_string_lossy(), self.target.to_string_lossy());
        let place = quoted(&format!(".{target}"));
        let make = if self.source.is_dir() {
            format!("mkdir -p {place}")
        } else {
            format!("mkdir -p \"$(dirname {place})\" && touch {place}")
        };
        let mode = if self.read_only { "-o ro " } else { "" };
        format!("{make} && mount --bind {mode}{} {place}", quoted(&source))
    }
}

/// One word for the shell, whatever it holds.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Refuses early what the sandbox is made with.
///
/// # Errors
/// When a program of util-linux is missing or namespaces are not allowed.
pub fn check() -> Result<()> {
    let mut probe = Command::new("/usr/bin/unshare");
    probe.args(["--mount", "--uts"]);
    if !is_root() {
        probe.arg("--map-root-user");
    }
    let done = probe.args(["/bin/true"]).output().context("unshare of util-linux")?;
    anyhow::ensure!(
        done.status.success(),
        "pods run in a mount namespace, which this machine refuses: {}",
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;
    use crate::process::Process;

    fn sandbox(folder: &Path, script: &str) -> Sandbox {
        let volume = folder.join("volume");
        fs::create_dir_all(folder.join("root")).unwrap();
        fs::create_dir_all(&volume).unwrap();
        fs::write(volume.join("it's a file"), "text").unwrap();
        Sandbox {
            root: folder.join("root"),
            hostname: "pod-1".into(),
            mounts: vec![Mount { source: volume, target: "/etc/app/config".into(), read_only: true }],
            user: User {
                id: Some((65_532, 65_532)),
                drop_capabilities: true,
                no_new_privileges: true,
                read_only_root: true,
                ..User::default()
            },
            folder: "/tmp".into(),
            environment: vec![("QUOTED".into(), "it's $HOME \"x\"".into())],
            command: ["sh", "-c", script].map(String::from).to_vec(),
        }
    }

    fn run(script: &str) -> (i32, String) {
        let folder = tempfile::tempdir().unwrap();
        let command = sandbox(folder.path(), script).command();
        let mut process = Process::start(&command, &folder.path().join("log")).unwrap();
        let status = process.wait(Duration::from_secs(20)).unwrap();
        (status.code().unwrap(), process.log())
    }

    #[test]
    fn a_container_sees_its_own_world() {
        let (code, log) =
            run("hostname; pwd; echo \"$QUOTED\"; cat \"/etc/app/config/it's a file\"; echo; env | wc -l");
        assert_eq!((code, log.as_str()), (0, "pod-1\n/tmp\nit's $HOME \"x\"\ntext\n3\n"));
    }

    #[test]
    fn a_restricted_container_may_write_nothing() {
        let (code, log) =
            run("for f in /x /etc/app/config/x /usr/bin/x; do touch $f && exit 9; done; exit 3");
        assert_eq!(code, 3, "{log}");
        assert_eq!(log.matches("Read-only file system").count() + log.matches("denied").count(), 3, "{log}");
        if is_root() {
            let (_, log) = run("id -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status");
            let wanted = "65532\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n";
            assert_eq!(log, wanted);
        }
    }

    #[test]
    fn the_process_is_the_container() {
        let folder = tempfile::tempdir().unwrap();
        let sandbox = sandbox(folder.path(), "trap 'exit 7' TERM; echo up; while :; do sleep 0.02; done");
        let log = folder.path().join("log");
        let mut process = Process::start(&sandbox.command(), &log).unwrap();
        process.wait_until(Duration::from_secs(20), || fs::read_to_string(&log).unwrap() == "up\n").unwrap();
        let inside = sandbox.enter(process.id(), &["hostname".into()]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&inside.stdout), "pod-1\n", "{inside:?}");
        process.signal(crate::process::Signal::Terminate).unwrap();
        assert_eq!(process.wait(Duration::from_secs(20)).unwrap().code(), Some(7));
    }
}
