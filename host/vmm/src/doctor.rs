//! What this host can give VMs, and what to do about what it does not.
//!
//! Called by: `bedplate doctor`.
//!
//! Invariant: it looks and changes nothing, but for the kept verdict of the probe, which is made anew.

use crate::kvm_verdict;
use cpu_kvm::{KvmHypervisor, KvmUnavailable};
use serde::Serialize;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// What was found about one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The thing.
    pub what: &'static str,
    /// It is there, and works.
    pub good: bool,
    /// In a sentence.
    pub detail: String,
    /// What would make it good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way_out: Option<&'static str>,
}

/// Where the system shows itself.
struct System {
    dev: PathBuf,
    proc: PathBuf,
    sys: PathBuf,
    root: bool,
}

/// Looks at this host.
pub fn examine() -> Vec<Finding> {
    let root = rustix::process::geteuid().is_root();
    let system = System { dev: "/dev".into(), proc: "/proc".into(), sys: "/sys".into(), root };
    let mut all = kvm(KvmHypervisor::open());
    all.extend([
        translator(cpu_translate::probe()),
        system.tap(),
        system.memory(),
        system.huge_pages(),
        system.userfaultfd(),
        system.user_namespaces(),
        jail(jail::support()),
    ]);
    all
}

fn good(what: &'static str, detail: impl Into<String>) -> Finding {
    Finding { what, good: true, detail: detail.into(), way_out: None }
}

fn bad(what: &'static str, detail: impl Into<String>, way_out: Option<&'static str>) -> Finding {
    Finding { what, good: false, detail: detail.into(), way_out }
}

/// The device, what its probe says, and the engine that follows from it.
fn kvm(opened: Result<KvmHypervisor, KvmUnavailable>) -> Vec<Finding> {
    let (device, why_not) = match opened {
        Ok(kvm) => {
            let probe = kvm.probe();
            kvm_verdict::keep(probe);
            (good("kvm", "/dev/kvm can be used"), probe.problems.join("; "))
        }
        Err(error) => {
            let way_out = match &error {
                KvmUnavailable::Open(error) => open_kvm_way_out(error),
                _ => None,
            };
            let reason = error.to_string();
            (bad("kvm", reason.clone(), way_out), reason)
        }
    };
    let engine = if why_not.is_empty() {
        good("engine", "auto takes kvm: it runs guests' kernels")
    } else {
        bad("engine", format!("auto takes soft, because of this host's KVM: {why_not}"), None)
    };
    vec![device, engine]
}

/// Whether engine `soft` can make code.
fn translator(probe: io::Result<()>) -> Finding {
    match probe {
        Ok(()) => good("translator", "engine soft translates what runs often"),
        Err(error) => bad(
            "translator",
            format!("engine soft interprets everything: this host lets no program make code ({error})"),
            Some("with SELinux: allow execmem for this program"),
        ),
    }
}

/// What the jail of a VM's process is made of here.
fn jail(support: jail::Support) -> Finding {
    let lacks = support.lacks();
    let jail::Support { landlock, user, .. } = support;
    if !lacks.is_empty() {
        let way_out = match landlock {
            None => Some(
                "boot with landlock in the list of security modules (lsm=landlock,...); Linux 5.13 or newer",
            ),
            Some(_) => None,
        };
        return bad("jail", lacks.join("; "), way_out);
    }
    let version = landlock.unwrap_or_default();
    let user = if user.is_some() { ", root becomes a user without a name" } else { "" };
    good("jail", format!("a VM's process is held by seccomp and landlock (version {version}){user}"))
}

fn open_kvm_way_out(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            Some("add yourself to the group of /dev/kvm (usermod -aG kvm NAME) and log in again")
        }
        io::ErrorKind::NotFound => {
            Some("switch virtualization on in the firmware, and load kvm_intel or kvm_amd (modprobe)")
        }
        _ => None,
    }
}

impl System {
    fn tap(&self) -> Finding {
        let path = self.dev.join("net/tun");
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(_) => good("tap", "TAP interfaces can be used"),
            Err(error) => bad(
                "tap",
                format!("{}: {error}; the user-mode network works without", path.display()),
                Some(
                    "load tun (modprobe tun); a TAP interface that is yours: ip tuntap add NAME mode tap user YOU",
                ),
            ),
        }
    }

    fn memory(&self) -> Finding {
        let text = read(&self.proc.join("meminfo"));
        let mib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).map(|kib| kib >> 10)
        };
        match (mib("MemAvailable"), mib("MemTotal")) {
            (Some(free), Some(all)) => good("memory", format!("{free} MiB of {all} MiB are free for guests")),
            _ => bad("memory", "/proc/meminfo does not say how much there is", None),
        }
    }

    fn huge_pages(&self) -> Finding {
        let text = read(&self.sys.join("kernel/mm/transparent_hugepage/shmem_enabled"));
        let chosen = text.split_once('[').and_then(|(_, rest)| Some(rest.split_once(']')?.0));
        let pool = self.sys.join("kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let free: u64 = read(&pool).trim().parse().unwrap_or(0);
        match chosen {
            Some(mode @ ("always" | "within_size" | "advise" | "force")) => {
                good("huge pages", format!("transparent ones for shared memory: {mode}; {free} reserved"))
            }
            _ if free > 0 => good("huge pages", format!("{free} of 2 MiB are free")),
            _ => bad(
                "huge pages",
                "guests' RAM is in pages of 4 KiB",
                Some("echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            ),
        }
    }

    fn userfaultfd(&self) -> Finding {
        let device = OpenOptions::new().read(true).write(true).open(self.dev.join("userfaultfd")).is_ok();
        let allowed = read(&self.proc.join("sys/vm/unprivileged_userfaultfd"));
        match allowed.trim() {
            _ if device || self.root => good("userfaultfd", "a guest can run before its RAM has arrived"),
            "1" => good("userfaultfd", "a guest can run before its RAM has arrived"),
            _ => bad(
                "userfaultfd",
                "not for you: RAM arrives before a guest runs",
                Some("sysctl vm.unprivileged_userfaultfd=1, or rights on /dev/userfaultfd"),
            ),
        }
    }

    fn user_namespaces(&self) -> Finding {
        let number = |name: &str| read(&self.proc.join("sys").join(name)).trim().parse::<u64>().ok();
        let most = number("user/max_user_namespaces").unwrap_or(0);
        // Debian's own switch; elsewhere it does not exist.
        let clone = number("kernel/unprivileged_userns_clone").unwrap_or(1);
        if most > 0 && (clone > 0 || self.root) {
            return good("user namespaces", "can be made");
        }
        bad(
            "user namespaces",
            "cannot be made",
            Some("sysctl user.max_user_namespaces=1000 kernel.unprivileged_userns_clone=1"),
        )
    }
}

/// A small file of the system's; empty if there is none.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(folder: &Path, root: bool) -> System {
        let at = |name: &str| folder.join(name);
        System { dev: at("dev"), proc: at("proc"), sys: at("sys"), root }
    }

    fn put(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_host_that_gives_nothing_is_told_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let system = system(folder.path(), false);
        for finding in [system.tap(), system.huge_pages(), system.userfaultfd(), system.user_namespaces()] {
            assert!(!finding.good && finding.way_out.is_some(), "{finding:?}");
        }
        assert!(!system.memory().good);
    }

    #[test]
    fn a_host_that_gives_all() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        put(at, "dev/net/tun", "");
        put(at, "proc/meminfo", "MemTotal:  2097152 kB\nMemFree: 1 kB\nMemAvailable:  1048576 kB\n");
        put(at, "sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [advise] never\n");
        put(at, "proc/sys/vm/unprivileged_userfaultfd", "1\n");
        put(at, "proc/sys/user/max_user_namespaces", "1000\n");
        let system = system(at, false);
        assert_eq!(system.memory(), good("memory", "1024 MiB of 2048 MiB are free for guests"));
        for finding in [system.tap(), system.huge_pages(), system.userfaultfd(), system.user_namespaces()] {
            assert!(finding.good, "{finding:?}");
        }
        put(at, "proc/sys/kernel/unprivileged_userns_clone", "0\n");
        assert!(!system.user_namespaces().good);
        assert!(self::system(at, true).user_namespaces().good);
    }

    #[test]
    fn a_host_that_forbids_new_code() {
        assert!(translator(Ok(())).good);
        let without = translator(Err(io::Error::from_raw_os_error(13)));
        assert!(!without.good && without.detail.contains("Permission denied") && without.way_out.is_some());
    }

    #[test]
    fn a_jail_with_holes_is_told_of() {
        let whole = jail::Support { seccomp: true, landlock: Some(7), user: None };
        assert!(jail(whole).good && jail(whole).detail.contains("version 7"));
        let open = jail(jail::Support { landlock: None, ..whole });
        assert!(!open.good && open.detail.contains("no landlock") && open.way_out.unwrap().contains("lsm="));
        let root = jail(jail::Support { user: Some(false), ..whole });
        assert!(!root.good && root.detail.contains("stays root"));
    }

    #[test]
    fn a_kvm_that_cannot_be_opened_decides_the_engine() {
        let denied = || KvmUnavailable::Open(io::Error::from_raw_os_error(13));
        let [device, engine] = kvm(Err(denied())).try_into().unwrap();
        assert!(!device.good && device.way_out.unwrap().contains("usermod"));
        assert!(engine.detail.contains("auto takes soft") && engine.detail.contains("/dev/kvm"));
    }
}
