//! Child processes that go into the jail as each kind of thread, and what they can do there.

use jail::{FileUse, Thread};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

const WHAT: &str = "JAIL_TEST_CHILD";
const FOLDER: &str = "JAIL_TEST_FOLDER";

/// A child of this test that does `what` (see [`child`]).
fn start(what: &str, folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(WHAT, what)
        .env(FOLDER, folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn run(what: &str, folder: &Path) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = start(what, folder).wait_with_output().unwrap();
    (status.code(), String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr))
}

/// In a child process only: a thread goes in, and does what the environment says.
#[test]
fn child() {
    let Ok(what) = std::env::var(WHAT) else { return };
    let folder = std::path::PathBuf::from(std::env::var_os(FOLDER).unwrap());
    if let Some(calls) = what.strip_prefix("without ") {
        take_away(calls);
    }
    jail::arm().unwrap().into_iter().for_each(|lack| println!("{lack}"));
    let inside = std::thread::Builder::new().name("inside".into()).spawn(move || {
        let (what, number) = what.split_once(' ').unwrap_or((&what, ""));
        match what {
            "forbidden" => forbidden(Thread::ALL[number.parse::<usize>().unwrap()]),
            "files" => files(&folder),
            "threads" => threads(),
            "writable-code" => writable_code(),
            "gives-back" => gives_back(),
            "other-architecture" => other_architecture(),
            "without" => holes(&folder),
            "stay" => stay(&folder),
            other => panic!("{other}?"),
        }
    });
    inside.unwrap().join().unwrap();
}

#[allow(unsafe_code)]
fn forbidden(thread: Thread) {
    jail::enter(thread, &[]);
    println!("inside");
    // SAFETY: PTRACE_TRACEME of a process that is about to end.
    unsafe { libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0) };
    println!("it was allowed");
}

fn files(folder: &Path) {
    jail::enter(
        Thread::Main,
        &[FileUse::Read(folder.join("mine")), FileUse::RemoveIn(folder.join("sockets"))],
    );
    let read = |name: &str| match std::fs::read_to_string(folder.join(name)) {
        Ok(text) => println!("{name}: {text}"),
        Err(error) => println!("{name}: {:?}", error.kind()),
    };
    read("mine/file");
    read("others/file");
    read("mine/../others/file");
    println!("new: {:?}", std::fs::File::create(folder.join("mine/new")).map_err(|e| e.kind()));
    println!("passwd: {:?}", std::fs::read("/etc/passwd").map_err(|e| e.kind()).map(|_| ()));
    println!("socket: {:?}", std::fs::remove_file(folder.join("sockets/own")));
}

fn threads() {
    jail::enter(Thread::Main, &[]);
    let answer = std::thread::Builder::new().name("born-inside".into()).spawn(|| {
        jail::inherit(Thread::Control);
        6 * 7
    });
    println!("answer {}", answer.unwrap().join().unwrap());
    let panicked = std::thread::spawn(|| panic!("on purpose")).join();
    println!("panicked {}", panicked.is_err());
}

#[allow(unsafe_code)]
fn writable_code() {
    jail::enter(Thread::Vcpu, &[]);
    let map = |protection| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice, which nobody uses.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) }
    };
    println!("inside {}", map(libc::PROT_READ | libc::PROT_WRITE) != libc::MAP_FAILED);
    map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    println!("it was allowed");
}

/// An allocator that gives memory back looks at the kernel's settings first (glibc: in heaps of threads).
fn gives_back() {
    jail::enter(Thread::Events, &[]);
    let many: Vec<Vec<u8>> = (0..200).map(|n| vec![n as u8; 100_000]).collect();
    println!("sum {}", many.iter().map(|one| usize::from(one[99_999])).sum::<usize>());
    drop(many);
    let opened = std::fs::File::open("/proc/sys/vm/overcommit_memory");
    println!("opened {}", opened.is_ok());
}

#[allow(unsafe_code)]
fn other_architecture() {
    jail::enter(Thread::Vcpu, &[]);
    println!("inside");
    let answer: i32;
    // SAFETY: call 20 of 32-bit programs is getpid, which changes nothing but EAX.
    unsafe {
        std::arch::asm!("int 0x80", inout("eax") 20 => answer, lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _)
    };
    println!("it was allowed: {answer}");
}

/// Makes this kernel look like an older one.
fn take_away(calls: &str) {
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
    let calls = match calls {
        "landlock" => vec![libc::SYS_landlock_create_ruleset, libc::SYS_landlock_restrict_self],
        _ => vec![libc::SYS_seccomp],
    };
    let rules = calls.into_iter().map(|call| (call, Vec::new())).collect();
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, absent, TargetArch::x86_64).unwrap();
    seccompiler::apply_filter(&seccompiler::BpfProgram::try_from(filter).unwrap()).unwrap();
}

#[allow(unsafe_code)]
fn holes(folder: &Path) {
    jail::enter(Thread::Main, &[]);
    println!("file: {:?}", std::fs::read_to_string(folder.join("file")).map_err(|error| error.kind()));
    // In a PID namespace whose parent holds the session's leader, the session is 0.
    // SAFETY: asks for the session of this process.
    println!("session: {}", unsafe { libc::getsid(0) } >= 0);
}

fn stay(folder: &Path) {
    let mut image = std::fs::File::options().write(true).open(folder.join("image")).unwrap();
    jail::enter(Thread::Disk, &[]);
    image.write_all(b"still writable").unwrap();
    println!("inside");
    let _ = std::io::stdin().read(&mut [0]);
}

fn nothing() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_forbidden_call_ends_the_process_with_its_name_on_every_thread() {
    for (number, thread) in Thread::ALL.into_iter().enumerate() {
        let (code, said) = run(&format!("forbidden {number}"), nothing().path());
        let line = format!("forbidden system call ptrace (101) in {}", thread.name());
        assert!(said.contains("inside") && said.contains(&line), "{said}");
        assert!(!said.contains("allowed"), "{said}");
        assert_eq!(code, Some(jail::violation::EXIT_CODE), "{said}");
    }
}

#[test]
fn memory_that_is_writable_and_executable_is_forbidden() {
    let (code, said) = run("writable-code", nothing().path());
    assert!(said.contains("inside true") && said.contains("forbidden system call mmap (9)"), "{said}");
    assert_eq!(code, Some(jail::violation::EXIT_CODE), "{said}");
}

#[test]
fn memory_is_given_back_inside() {
    let (code, said) = run("gives-back", nothing().path());
    assert!(said.contains("sum 19900") && said.contains("opened false"), "{said}");
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn calls_of_32_bit_programs_kill_the_process() {
    use std::os::unix::process::ExitStatusExt;
    let output = start("other-architecture", nothing().path()).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("inside") && !said.contains("allowed"), "{said}");
    // Where the kernel has no such calls the instruction faults.
    let signal = output.status.signal();
    assert!(matches!(signal, Some(libc::SIGSYS | libc::SIGSEGV)), "{:?}", output.status);
}

#[test]
fn threads_start_and_panic_inside() {
    let (code, said) = run("threads", nothing().path());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("answer 42") && said.contains("panicked true"), "{said}");
    assert!(said.contains("on purpose"), "{said}");
}

#[test]
fn a_file_outside_cannot_be_opened() {
    if jail::support().landlock.is_none() {
        println!("SKIPPED: this kernel has no landlock");
        return;
    }
    let folder = nothing();
    // As root, the jail's user is another: everybody may look.
    open_to_all(folder.path());
    for name in ["mine", "others", "sockets"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        open_to_all(&folder.path().join(name));
    }
    for name in ["mine/file", "others/file", "sockets/own"] {
        std::fs::write(folder.path().join(name), "content").unwrap();
    }
    let (code, said) = run("files", folder.path());
    assert_eq!(code, Some(0), "{said}");
    for line in [
        "mine/file: content",
        "others/file: PermissionDenied",
        "mine/../others/file: PermissionDenied",
        "new: Err(PermissionDenied)",
        "passwd: Err(PermissionDenied)",
        "socket: Ok(())",
    ] {
        assert!(said.contains(line), "{line} in {said}");
    }
}

#[test]
fn an_older_kernel_is_told_of_and_the_rest_holds() {
    let folder = nothing();
    open_to_all(folder.path());
    std::fs::write(folder.path().join("file"), "content").unwrap();
    let (code, said) = run("without landlock", folder.path());
    assert!(said.contains("this kernel has no landlock") && !said.contains("no seccomp"), "{said}");
    assert!(
        said.contains(r#"file: Ok("content")"#) && said.contains("forbidden system call getsid (124)"),
        "{said}"
    );
    assert_eq!(code, Some(jail::violation::EXIT_CODE), "{said}");

    let (code, said) = run("without seccomp", folder.path());
    assert!(said.contains("this kernel has no seccomp") && said.contains("session: true"), "{said}");
    assert_eq!(said.contains("PermissionDenied"), jail::support().landlock.is_some(), "{said}");
    assert_eq!(code, Some(0), "{said}");
}

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
}

#[test]
fn root_becomes_nobody_and_keeps_what_it_has_open() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return;
    }
    let folder = nothing();
    std::fs::write(folder.path().join("image"), "").unwrap();
    let mut child = start("stay", folder.path());
    let mut said = String::new();
    let mut stdout = child.stdout.take().unwrap();
    while !said.contains("inside\n") {
        let mut byte = [0];
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "{said}");
        said.push(byte[0].into());
    }
    let status = status_of_thread(child.id(), "inside");
    let field = |name: &str| -> Vec<&str> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().collect()
    };
    let (users, groups) = (field("Uid:"), field("Gid:"));
    assert!(users.iter().chain(&groups).all(|id| *id == users[0] && *id != "0"), "{status}");
    assert!(field("Groups:").is_empty(), "{status}");
    for set in ["CapInh:", "CapPrm:", "CapEff:"] {
        assert_eq!(field(set), ["0000000000000000"], "{status}");
    }
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), (vec!["1"], vec!["2"]));
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read(folder.path().join("image")).unwrap(), b"still writable");
}

fn status_of_thread(process: u32, name: &str) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let statuses = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let named = format!("Name:\t{name}\n");
    statuses.into_iter().find(|status| status.starts_with(&named)).unwrap()
}
