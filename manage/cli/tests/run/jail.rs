//! The VM's process in its jail.

use crate::bench::{Bench, counter, run_args};

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
