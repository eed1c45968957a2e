//! The jail's table: which thread may make which system call, with which arguments, and what for. What is not here is
//! forbidden.
//!
//! Called by: `filter`. Rows of one call are alternatives.
//!
//! Device models run on vCPUs and the event loop, on the main thread, and where input and the power button arrive. A thread is already running when it goes into the jail: what its
//! start needs is listed only for threads that start others.

use crate::Thread;
use libc::{
    AF_INET, AF_INET6, CLONE_THREAD, CLONE_VM, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_OFD_GETLK, F_OFD_SETLK,
    FIONBIO, PR_SET_NAME, PR_SET_VMA, PROT_EXEC, PROT_WRITE, TCGETS, TCGETS2, TCSETS, TCSETS2, TCSETSF,
    TCSETSW,
};
use syscalls::Sysno;

/// A set of threads: their [`Thread::bit`]s.
pub type Threads = u8;

const MAIN: Threads = Thread::Main.bit();
const CONTROL: Threads = Thread::Control.bit();
const VCPU: Threads = Thread::Vcpu.bit();
const EVENTS: Threads = Thread::Events.bit();
const DISK: Threads = Thread::Disk.bit();
const CONSOLE: Threads = Thread::Console.bit();
const NETWORK: Threads = Thread::Network.bit();
const WATCH: Threads = Thread::Watch.bit();
const ALL: Threads = 0xFF;
const DEVICES: Threads = MAIN | VCPU | EVENTS | CONTROL | CONSOLE;

/// With which arguments a call is allowed.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// All.
    Any,
    /// Argument (from 0) is one of these.
    One(u8, &'static [u64]),
    /// Of argument (from 0), these bits have this value.
    Bits(u8, u64, u64),
    /// The first argument is this process.
    Ourselves,
    /// Never: the caller hears that there is no such call (ENOSYS), and goes another way.
    Absent,
}
use When::{Absent, Any, Bits, One, Ourselves};

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The call.
    pub call: Sysno,
    /// Who.
    pub who: Threads,
    /// How.
    pub when: When,
    /// What for.
    pub why: &'static str,
}

const fn row(call: Sysno, who: Threads, when: When, why: &'static str) -> Row {
    Row { call, who, when, why }
}

/// The terminal's settings: given back on whatever thread the process dies.
const TERMINAL: &[u64] = &[TCGETS, TCSETS, TCSETSW, TCSETSF, TCGETS2, TCSETS2];
/// Requests of KVM have this in bits 8 to 15 (KVMIO).
const KVM: When = Bits(1, 0xFF00, 0xAE00);
const NOT_EXECUTABLE: When = Bits(2, PROT_EXEC as u64, 0);
/// Executable, and not writable: the translator's code (W^X).
const EXECUTABLE: When = Bits(2, (PROT_EXEC | PROT_WRITE) as u64, PROT_EXEC as u64);
/// asm/prctl.h
const ARCH_SET_GS: u64 = 0x1001;
const A_THREAD: When = Bits(0, (CLONE_THREAD | CLONE_VM) as u64, (CLONE_THREAD | CLONE_VM) as u64);
const INTERNET: When = One(0, &[AF_INET as u64, AF_INET6 as u64]);
const FD_QUERIES: When = One(1, &[F_GETFD as u64, F_GETFL as u64, F_DUPFD_CLOEXEC as u64]);
const IMAGE_LOCKS: When = One(1, &[F_OFD_SETLK as u64, F_OFD_GETLK as u64]);

/// The table.
#[rustfmt::skip]
pub const TABLE: &[Row] = &[
    // Every thread: memory, locks, time, what it has open, its end, and the process's.
    row(Sysno::futex,            ALL, Any, "locks, sleep"),
    row(Sysno::sched_yield,      ALL, Any, "locks"),
    row(Sysno::sched_getaffinity, ALL, Any, "the allocator counts processors"),
    row(Sysno::mmap,             ALL, NOT_EXECUTABLE, "memory"),
    row(Sysno::mprotect,         ALL, NOT_EXECUTABLE, "the allocator grows"),
    row(Sysno::munmap,           ALL, Any, "memory"),
    row(Sysno::mremap,           ALL, Any, "the allocator moves; the translator's code"),
    row(Sysno::madvise,          ALL, Any, "memory goes back"),
    row(Sysno::brk,              ALL, Any, "the allocator grows"),
    row(Sysno::getrandom,        ALL, Any, "hash keys, the guest's entropy"),
    row(Sysno::clock_gettime,    ALL, Any, "time, where the vDSO has none"),
    row(Sysno::clock_nanosleep,  ALL, Any, "sleep"),
    row(Sysno::nanosleep,        ALL, Any, "sleep"),
    row(Sysno::restart_syscall,  ALL, Any, "a sleep that a signal interrupted"),
    row(Sysno::read,             ALL, Any, "eventfds, signals, files"),
    row(Sysno::write,            ALL, Any, "eventfds, messages, files"),
    row(Sysno::close,            ALL, Any, "the last owner of something ends"),
    row(Sysno::fcntl,            ALL, FD_QUERIES, "descriptors are duplicated"),
    row(Sysno::ioctl,            ALL, One(1, TERMINAL), "the terminal comes back however the process ends"),
    row(Sysno::rt_sigaction,     ALL, Any, "a fatal signal's way"),
    row(Sysno::rt_sigprocmask,   ALL, Any, "a thread's end, abort"),
    row(Sysno::rt_sigreturn,     ALL, Any, "out of a handler"),
    row(Sysno::sigaltstack,      ALL, Any, "a thread's end"),
    row(Sysno::gettid,           ALL, Any, "abort"),
    row(Sysno::getpid,           ALL, Any, "abort"),
    row(Sysno::tgkill,           ALL, Ourselves, "vCPUs are kicked, abort"),
    row(Sysno::exit,             ALL, Any, "a thread's end"),
    row(Sysno::exit_group,       ALL, Any, "the process's end"),

    // Threads that start threads.
    row(Sysno::clone3,           MAIN | CONTROL, Absent, "its flags cannot be seen: clone is taken instead"),
    row(Sysno::clone,            MAIN | CONTROL, A_THREAD, "a thread for each connection, KVM's watch"),
    row(Sysno::set_robust_list,  MAIN | CONTROL, Any, "a thread's start"),
    row(Sysno::rseq,             MAIN | CONTROL, Any, "a thread's start"),
    row(Sysno::prctl,            MAIN | CONTROL, One(0, &[PR_SET_NAME as u64, PR_SET_VMA as u64]), "a thread's name"),

    // Devices.
    row(Sysno::timerfd_settime,  DEVICES, Any, "a timer of the event loop"),
    row(Sysno::epoll_ctl,        DEVICES | NETWORK, Any, "what is waited for"),
    row(Sysno::epoll_wait,       EVENTS | NETWORK, Any, "the loop itself"),
    row(Sysno::epoll_pwait,      EVENTS | NETWORK, Any, "the loop itself"),
    row(Sysno::readv,            DEVICES, Any, "TAP"),
    row(Sysno::writev,           DEVICES, Any, "TAP"),

    // Engines.
    row(Sysno::ioctl,            DEVICES | WATCH, KVM, "KVM: vCPUs, interrupts"),
    row(Sysno::mmap,             MAIN, EXECUTABLE, "the translator's code, when a VM moves to it"),
    row(Sysno::ftruncate,        MAIN, Any, "images and saves"),
    row(Sysno::arch_prctl,       VCPU, One(0, &[ARCH_SET_GS]), "the translator's base register"),
    row(Sysno::eventfd2,         DEVICES, Any, "doorbells"),
    row(Sysno::pread64,          MAIN | VCPU | EVENTS | CONTROL | WATCH, Any, "KVM's statistics"),

    // Images, the memory of the guest, saves: files that are open.
    row(Sysno::pread64,          DISK, Any, "images"),
    row(Sysno::pwrite64,         MAIN | DISK, Any, "images, saves"),
    row(Sysno::preadv,           MAIN | DISK, Any, "images"),
    row(Sysno::pwritev,          MAIN | DISK, Any, "images"),
    row(Sysno::fallocate,        MAIN | DISK, Any, "discard, zeroes, memory that is given back"),
    row(Sysno::fdatasync,        MAIN | DISK, Any, "flush"),
    row(Sysno::fsync,            MAIN | DISK, Any, "flush, saves"),
    row(Sysno::ftruncate,        DISK, Any, "an image grows"),
    row(Sysno::lseek,            MAIN | DISK, Any, "sizes, holes"),
    row(Sysno::fstat,            MAIN | DISK, Any, "sizes"),
    row(Sysno::newfstatat,       MAIN | DISK | CONSOLE | NETWORK, Any, "sizes, whose socket it is"),
    row(Sysno::statx,            MAIN | DISK | CONSOLE | NETWORK, Any, "identities, whose socket it is"),
    row(Sysno::fstatfs,          MAIN | DISK, Any, "how a file system aligns"),
    row(Sysno::fcntl,            MAIN | DISK, IMAGE_LOCKS, "images are locked"),

    // Files by name: landlock says which.
    row(Sysno::openat,           MAIN | NETWORK, Any, "a block device's statistics; resolv.conf"),
    row(Sysno::openat,           !(MAIN | NETWORK), Absent, "glibc's allocator looks whether the kernel overcommits before it gives back"),
    row(Sysno::unlink,           MAIN | CONSOLE, Any, "its own socket's file"),
    row(Sysno::unlinkat,         MAIN | CONSOLE, Any, "its own socket's file"),

    // Consoles and control: sockets that are open, and who connects to them.
    row(Sysno::poll,             MAIN | CONSOLE | CONTROL, Any, "consoles"),
    row(Sysno::ppoll,            MAIN | CONSOLE | CONTROL, Any, "consoles"),
    row(Sysno::accept4,          CONSOLE | CONTROL | NETWORK, Any, "a client"),
    row(Sysno::ioctl,            CONSOLE | CONTROL, One(1, &[FIONBIO]), "a client"),
    row(Sysno::sendto,           CONSOLE | CONTROL | NETWORK, Any, "answers"),
    row(Sysno::recvfrom,         CONSOLE | CONTROL | NETWORK, Any, "requests"),
    row(Sysno::sendmsg,          CONTROL, Any, "answers"),
    row(Sysno::recvmsg,          CONTROL, Any, "requests, with files"),
    row(Sysno::setsockopt,       CONTROL | NETWORK, Any, "patience; options of guests' connections"),
    row(Sysno::shutdown,         MAIN | CONTROL | CONSOLE | NETWORK, Any, "ends of connections"),

    // The user-mode network.
    row(Sysno::socket,           NETWORK, INTERNET, "guests' connections"),
    row(Sysno::connect,          NETWORK, Any, "guests' connections"),
    row(Sysno::getsockopt,       NETWORK, Any, "whether they came about"),
    row(Sysno::getpeername,      NETWORK, Any, "whether they came about"),
    row(Sysno::getsockname,      NETWORK, Any, "their own end"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_could_use_against_the_host_is_in_no_list() {
        for call in [
            Sysno::execve,
            Sysno::execveat,
            Sysno::fork,
            Sysno::vfork,
            Sysno::ptrace,
            Sysno::process_vm_writev,
            Sysno::kill,
            Sysno::tkill,
            Sysno::bind,
            Sysno::listen,
            Sysno::mount,
            Sysno::unshare,
            Sysno::setns,
            Sysno::bpf,
            Sysno::io_uring_setup,
            Sysno::userfaultfd,
            Sysno::setuid,
            Sysno::setresuid,
            Sysno::chmod,
            Sysno::chown,
            Sysno::rename,
            Sysno::open,
            Sysno::creat,
            Sysno::memfd_secret,
            Sysno::pkey_mprotect,
            Sysno::personality,
            Sysno::keyctl,
            Sysno::perf_event_open,
            Sysno::init_module,
            Sysno::kexec_load,
        ] {
            assert!(TABLE.iter().all(|row| row.call != call), "{call}");
        }
        // A vCPU names no file and no peer.
        for call in
            [Sysno::openat, Sysno::socket, Sysno::connect, Sysno::clone, Sysno::unlink, Sysno::recvmsg]
        {
            let allowed = |row: &Row| row.who & VCPU != 0 && !matches!(row.when, Absent);
            assert!(TABLE.iter().all(|row| row.call != call || !allowed(row)), "{call}");
        }
    }

    #[test]
    fn nothing_writable_becomes_executable() {
        for row in TABLE.iter().filter(|row| matches!(row.call, Sysno::mmap | Sysno::mprotect)) {
            let Bits(2, mask, value) = row.when else { panic!("{row:?}") };
            assert!(mask & PROT_EXEC as u64 != 0, "{row:?}");
            assert!(
                value & PROT_EXEC as u64 == 0 || mask & PROT_WRITE as u64 != 0 && row.call == Sysno::mmap
            );
        }
    }
}
