//! The VM's process in its jail.

use crate::bench::{Bench, counter, halter, run_args};
use crate::terminal::Terminal;

/// Name, and the fields that the jail sets, of every thread of a process.
fn threads(process: u32) -> Vec<(String, [String; 3])> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let statuses = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
        line.split_whitespace().next().unwrap_or("").to_string()
    };
    let of =
        |s: String| (field(&s, "Name:"), ["NoNewPrivs:", "Seccomp:", "Uid:"].map(|name| field(&s, name)));
    statuses.map(of).collect()
}

#[test]
fn every_thread_is_inside_before_the_guest_runs_unless_it_is_switched_off() {
    let [_, seccomp, user] = threads(std::process::id()).swap_remove(0).1;
    if seccomp.is_empty() {
        println!("SKIPPED: this kernel has no seccomp");
        return;
    }
    let bench = Bench::new();
    let (kernel, disk) = (bench.kernel(&counter()), bench.disk());
    let args = run_args(&kernel, &["--cpus", "2", "--disk", disk.to_str().unwrap(), "--net", "user"]);
    let mut vm = bench.start(&args);
    vm.expect(">");
    let inside = threads(vm.id());
    for name in ["bedplate", "vcpu0", "vcpu1", "events", "block-0", "console", "usernet", "control"] {
        let found = inside.iter().find(|(thread, _)| thread == name);
        assert!(found.is_some(), "{name} in {inside:?}");
    }
    for (name, [no_new_privileges, seccomp, id]) in &inside {
        assert_eq!((no_new_privileges.as_str(), seccomp.as_str()), ("1", "2"), "{name}");
        assert!(id != "0" && (*id == user || user == "0"), "{name}: user {id}");
    }
    vm.send("q");
    assert_eq!(vm.wait().0, 0);

    let mut vm = bench.start(&[&args[..], &["--no-sandbox"]].concat());
    vm.expect(">");
    for (name, [_, filters, id]) in threads(vm.id()) {
        assert_eq!((&filters, &id), (&seccomp, &user), "{name}");
    }
    vm.send("q");
    assert_eq!(vm.wait().0, 0);
}

/// Makes `thread` of a running process ask for its parent: a call that no thread of a VM needs.
fn make_call(process: u32, thread: &str) -> nix::Result<()> {
    use nix::sys::{ptrace, wait};
    const GETPPID: u64 = 110;
    const BYTES_OF_SYSCALL: u64 = 2;
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map(Result::unwrap);
    let named = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == thread)
    };
    let task = tasks.into_iter().find(named).unwrap_or_else(|| panic!("no thread {thread}"));
    let id = nix::unistd::Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap());
    ptrace::seize(id, ptrace::Options::empty())?;
    // Again until it is stopped in a call: then the instruction before RIP is SYSCALL.
    loop {
        ptrace::interrupt(id)?;
        wait::waitpid(id, Some(wait::WaitPidFlag::__WALL))?;
        let mut registers = ptrace::getregs(id)?;
        if registers.orig_rax as i64 >= 0 {
            registers.rip -= BYTES_OF_SYSCALL;
            (registers.rax, registers.orig_rax) = (GETPPID, u64::MAX);
            ptrace::setregs(id, registers)?;
            return ptrace::detach(id, None);
        }
        ptrace::cont(id, None)?;
    }
}

#[test]
fn a_forbidden_call_of_a_running_vm_is_named_and_the_terminal_comes_back() {
    if threads(std::process::id())[0].1[1].is_empty() {
        println!("SKIPPED: this kernel has no seccomp");
        return;
    }
    for thread in ["bedplate", "vcpu0", "events", "block-0", "console", "usernet", "control"] {
        let (bench, mut terminal) = (Bench::new(), Terminal::new());
        let (kernel, disk) = (bench.kernel(&halter()), bench.disk());
        let args = run_args(&kernel, &["--disk", disk.to_str().unwrap(), "--net", "user"]);
        let mut child = terminal.start(&bench, &args);
        terminal.expect(">");
        assert!(terminal.is_raw());
        if let Err(error) = make_call(child.id(), thread) {
            println!("SKIPPED: this host lets nobody trace: {error}");
            child.kill().and_then(|()| child.wait()).unwrap();
            return;
        }
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("forbidden system call getppid (110)"), "{thread}: {said}");
        assert_eq!(output.status.code(), Some(25), "{thread}: {said}");
        assert!(terminal.is_as_before(), "{thread}");
    }
}
