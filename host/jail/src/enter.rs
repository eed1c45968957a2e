//! Going in: the process arms the jail, each thread goes in when it starts, the main thread comes last and looks whether
//! all are there.
//!
//! Called by: `vmm::launch` ([`arm`], [`close`]); every thread of a VM's process ([`enter`], or [`inherit`]).
//!
//! Invariants: there is no way out; the guest does not run before all threads are inside; a thread that one inside starts
//! has its parent's jail.

use crate::{FileUse, JailError, Thread, files, filter, user, violation};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long threads may take to go in.
const PATIENCE: Duration = Duration::from_secs(30);
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 16;
const STEP: Duration = Duration::from_millis(1);

/// What this kernel has for a jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Support {
    /// Filters of system calls that raise a signal (seccomp).
    pub seccomp: bool,
    /// Version of landlock's interface.
    pub landlock: Option<u32>,
    /// Root can become somebody else; `None`: it is not root.
    pub user: Option<bool>,
}

impl Support {
    /// What is missing, in sentences.
    pub fn lacks(&self) -> Vec<&'static str> {
        let all = [
            (!self.seccomp, "this kernel has no seccomp: system calls are not filtered"),
            (self.landlock.is_none(), "this kernel has no landlock: files are not fenced off"),
            (
                self.user == Some(false),
                "root cannot become another user here (no CAP_SETUID, or no other in its namespace): it stays root",
            ),
        ];
        all.into_iter().filter_map(|(lacking, words)| lacking.then_some(words)).collect()
    }
}

/// Looks what this kernel has.
#[allow(unsafe_code)]
pub fn support() -> Support {
    let trap = libc::SECCOMP_RET_TRAP;
    // SAFETY: both calls only ask: landlock for its version (no pointer), seccomp about the action at a valid address.
    let (landlock, trap_works) = unsafe {
        let version = libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, 1u32);
        let asked = libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0u32, &raw const trap);
        (version, asked == 0)
    };
    let landlock = u32::try_from(landlock).ok().filter(|version| *version > 0);
    Support { seccomp: trap_works, landlock, user: user::root_can_leave() }
}

/// include/linux/sched.h.
const PF_USER_WORKER: u32 = 0x4000;

static ARMED: OnceLock<Support> = OnceLock::new();
/// Threads that are inside.
static INSIDE: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());
/// The main thread is inside, or about to be: what starts from here on inherits.
static CLOSED: AtomicBool = AtomicBool::new(false);
static FAILED: OnceLock<String> = OnceLock::new();

/// From now on [`enter`] means it. What this kernel lacks for it, in sentences.
pub fn arm() -> Result<Vec<&'static str>, JailError> {
    let support = *ARMED.get_or_init(support);
    if support.seccomp {
        violation::install().map_err(|source| JailError::System { what: "answer SIGSYS", source })?;
    }
    limit_arenas();
    // A trace of the stack reads the program's file, which a jailed thread cannot.
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        eprintln!("bedplate: thread {} {info}\r", thread.name().unwrap_or("without a name"));
    }));
    Ok(support.lacks())
}

/// Says how many heaps the C library's allocator may have: it would look at `/sys` for the number of processors otherwise,
/// on whatever thread wants one more.
#[allow(unsafe_code)]
fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Whether this process has a jail.
pub fn is_armed() -> bool {
    ARMED.get().is_some()
}

/// The calling thread goes in as `thread`, for good, if the jail is armed; `files` are all that it can open from then on.
/// A failure is [`close`]'s. A thread that starts later has the jail of the main thread, which started it.
pub fn enter(thread: Thread, files: &[FileUse]) {
    let Some(support) = ARMED.get() else { return };
    if CLOSED.load(Ordering::Acquire) {
        return inherit(thread);
    }
    if let Err(error) = go_in(*support, thread, files) {
        let _ = FAILED.set(error.to_string());
    }
}

/// The calling thread was started by a `thread` that is inside: so is it.
pub fn inherit(thread: Thread) {
    if is_armed() {
        note(thread);
    }
}

/// The main thread goes in, after all others; after this returned well everything is inside.
pub fn close(files: &[FileUse]) -> Result<(), JailError> {
    let Some(support) = ARMED.get() else { return Ok(()) };
    wait_for_all_others()?;
    CLOSED.store(true, Ordering::Release);
    go_in(*support, Thread::Main, files)?;
    FAILED.get().map_or(Ok(()), |words| Err(JailError::Other(words.clone())))
}

fn go_in(support: Support, thread: Thread, files: &[FileUse]) -> Result<(), JailError> {
    let system = |what| move |source: io::Error| JailError::System { what, source };
    let programs = if support.seccomp { filter::programs(thread)? } else { Vec::new() };
    // The files are named while they can still be reached.
    let rules = support.landlock.map(|_| files::rules(thread, files)).transpose()?;
    if support.user == Some(true) && rustix::process::geteuid().is_root() {
        user::leave_root().map_err(JailError::User)?;
    }
    user::drop_capabilities().map_err(system("give up capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(|e| system("renounce new privileges")(e.into()))?;
    if let Some(rules) = rules {
        rules.restrict_self()?;
    }
    violation::this_is(thread);
    for program in &programs {
        seccompiler::apply_filter(program)?;
    }
    note(thread);
    Ok(())
}

/// The calling thread is inside.
fn note(thread: Thread) {
    violation::this_is(thread);
    inside().insert(own_id());
}

fn own_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

fn inside() -> std::sync::MutexGuard<'static, BTreeSet<i32>> {
    INSIDE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_for_all_others() -> Result<(), JailError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some(outside) =
            one_outside().map_err(|source| JailError::System { what: "see its threads", source })?
        else {
            return Ok(());
        };
        if let Some(words) = FAILED.get() {
            return Err(JailError::Other(words.clone()));
        }
        if Instant::now() >= deadline {
            let name = std::fs::read_to_string(Path::new("/proc/self/task").join(&outside).join("comm"));
            let name = name.map_or(outside, |name| name.trim_end().to_string());
            return Err(JailError::Outside { name });
        }
        std::thread::sleep(STEP);
    }
}

/// A thread of this process, other than the caller, that is not inside.
fn one_outside() -> io::Result<Option<String>> {
    let own = own_id();
    for entry in std::fs::read_dir("/proc/self/task")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let id: Option<i32> = name.parse().ok();
        if id.is_some_and(|id| id != own && !inside().contains(&id)) && !is_the_kernels(&name) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Whether a thread runs code of the kernel's only, such as KVM's for huge pages.
fn is_the_kernels(thread: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc/self/task").join(thread).join("stat"));
    stat.is_ok_and(|stat| flags(&stat).is_some_and(|flags| flags & PF_USER_WORKER != 0))
}

/// Of a thread's `stat` (proc_pid_stat(5)): field 9; field 2 is a name in parentheses, with anything in it.
fn flags(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_the_kernels_are_told_by_their_flags() {
        let stat = "7 (kvm) nx (x)) S 1 2 3 0 -1 4194560 100 0 0";
        assert_eq!(flags(stat), Some(4_194_560));
        assert_eq!(flags("7 (x) S 1"), None);
        let own = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        assert_eq!(flags(&own).unwrap() & PF_USER_WORKER, 0);
    }
}
