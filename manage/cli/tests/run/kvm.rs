//! The `kvm` engine as people meet it: guests that move, a KVM that serves them badly, and none at all. What this host's KVM
//! cannot do is told, never skipped in silence.

use crate::bench::{Bench, run_args};
use machine::testing::kernel;
use rustix::process::{Pid, Signal, kill_process};
use std::process::{Command, Output, Stdio};

/// What the program says about this host's KVM: `None` without one, and whether it runs guests' kernels.
fn kvm_here(bench: &Bench) -> Option<bool> {
    let findings: serde_json::Value =
        serde_json::from_slice(&bench.output(&["doctor", "--json"]).stdout).unwrap();
    let good = |what: &str| {
        let all = findings.as_array().unwrap();
        all.iter().any(|finding| finding["what"] == what && finding["good"] == true)
    };
    if !good("kvm") {
        eprintln!("not run: no KVM here");
    }
    good("kvm").then(|| good("engine"))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Answers every byte from COM1 with the next digit, and powers off on `q`. Between two looks it reads a port a few
/// thousand times with one instruction: what it does itself is little on every engine.
fn unhurried() -> Vec<u8> {
    let mut code = vec![
        0xBB, 0x00, 0x00, 0x20, 0x00, 0xC6, 0x03, b'0', // mov ebx, 200000h; mov byte [ebx], '0'
        0x66, 0xBA, 0xF8, 0x03, 0xB0, b'>', 0xEE, // mov dx, 3F8h; mov al, '>'; out dx, al
        // wait:
        0xB9, 0x00, 0x10, 0x00, 0x00, 0xBF, 0x00, 0x00, 0x30, 0x00, // mov ecx, 1000h; mov edi, 300000h
        0x66, 0xBA, 0x80, 0x00, 0xF3, 0x6C, // mov dx, 80h; rep insb
        0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, // mov dx, 3FDh; in al, dx; test al, 1
        0x74, 0xE7, // jz wait
        0x66, 0xBA, 0xF8, 0x03, 0xEC, 0x3C, b'q', // mov dx, 3F8h; in al, dx; cmp al, 'q'
        0x74, 0x07, // je off
        0xFE, 0x03, 0x8A, 0x03, 0xEE, // inc byte [ebx]; mov al, [ebx]; out dx, al
        0xEB, 0xD7, // jmp wait
              // off:
    ];
    code.extend(kernel::power_off());
    code
}

#[test]
fn a_running_vm_moves_to_soft_and_back() {
    let bench = Bench::new();
    if kvm_here(&bench).is_none() {
        return;
    }
    let kernel = bench.kernel(&unhurried());
    let mut vm = bench.start(&run_args(&kernel, &["--name", "mover", "--engine", "kvm"]));
    vm.expect(">");
    for (digit, engine) in ["1", "2", "3", "4"].iter().zip(["soft", "kvm", "soft", "kvm"]) {
        let moved = bench.output(&["ctl", "mover", "move", "--engine", engine]);
        let words = String::from_utf8_lossy(&moved.stdout).into_owned() + &said(&moved);
        assert!(moved.status.success() && words.contains(&format!("to {engine}")), "{words}");
        vm.send("x");
        vm.expect(digit);
        let again = bench.output(&["ctl", "mover", "move", "--engine", engine]);
        assert!(!again.status.success() && said(&again).contains("already"), "{}", said(&again));
    }
    vm.send("q");
    let (code, words) = vm.wait();
    assert_eq!(code, 0, "{words}");
}

/// Ring 0 for some millions of instructions: a KVM that emulates them is left.
#[test]
fn a_guest_that_kvm_serves_badly_ends_well_all_the_same() {
    let bench = Bench::new();
    let Some(real) = kvm_here(&bench) else { return };
    // mov ecx, 3000000; dec ecx; jnz
    let busy = [0xB9, 0xC0, 0xC6, 0x2D, 0x00, 0x49, 0x75, 0xFD];
    let code = [&busy[..], &busy, &kernel::print("done"), &kernel::power_off()].concat();
    let output = bench.run(&code, &["--engine", "kvm"]);
    let words = said(&output);
    assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"done"[..]), "{words}");
    assert_eq!(words.contains("executes the guest in software"), !real, "{words}");
}

/// Reads of a device that the interpreter has to complete, one after the other: the guest goes on elsewhere in the midst of
/// them, or from the start where KVM showed it another processor than its CPU model.
#[test]
fn a_guest_whose_instructions_are_completed_goes_on_on_soft() {
    let bench = Bench::new();
    let Some(real) = kvm_here(&bench) else { return };
    let code = [kernel::read_devices_with_x87(400_000), kernel::power_off()].concat();
    let output = bench.run(&code, &["--engine", "kvm"]);
    let words = said(&output);
    assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"done"[..]), "{words}");
    let how = if real { "goes on on soft" } else { "starts again on soft" };
    assert!(words.contains("executes the guest in software") && words.contains(how), "{words}");
}

/// UD2 without handlers: a doubtful KVM may have caused the shutdown, so the guest starts again elsewhere, once.
#[test]
fn a_shutdown_is_the_guests_own_or_is_tried_again() {
    let bench = Bench::new();
    let Some(real) = kvm_here(&bench) else { return };
    let output = bench.run(&[kernel::print("a"), vec![0x0F, 0x0B]].concat(), &["--engine", "kvm"]);
    let words = said(&output);
    assert_eq!(output.status.code(), Some(21), "{words}");
    let (times, told) =
        (output.stdout.len(), words.contains("went into shutdown") && words.contains("again on soft"));
    assert_eq!((times, told), if real { (1, false) } else { (2, true) }, "{words}");
}

/// Runs the program where `prepare` (shell) has changed the view of the system; `None` where that cannot be done.
fn elsewhere(bench: &Bench, prepare: &str, args: &[&str]) -> Option<Output> {
    let script = format!("{prepare} && echo ready >&2 && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--map-root-user", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_bedplate")]);
    command.args(args).env("XDG_RUNTIME_DIR", bench.path("run")).stdin(Stdio::null());
    let output = command.output().ok().filter(|output| said(output).contains("ready"));
    if output.is_none() {
        eprintln!("not run: a mount namespace cannot be made here");
    }
    output
}

#[test]
fn a_kvm_that_is_not_there_or_none_is_told_of() {
    let bench = Bench::new();
    let code = [kernel::print("runs"), kernel::power_off()].concat();
    let kernel = bench.kernel(&code);
    let cases = [
        ("mount -t tmpfs none /dev", "No such file or directory"),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm"),
    ];
    for (prepare, reason) in cases {
        let Some(output) = elsewhere(&bench, prepare, &run_args(&kernel, &["--engine", "kvm"])) else {
            return;
        };
        let words = said(&output);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(words.contains("engine kvm") && words.contains(reason), "{words}");

        let Some(output) = elsewhere(&bench, prepare, &run_args(&kernel, &["--engine", "auto"])) else {
            return;
        };
        let words = said(&output);
        assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"runs"[..]), "{words}");
        let lines: Vec<_> = words.lines().filter(|line| line.contains("engine soft, because")).collect();
        assert!(lines.len() == 1 && lines[0].contains(reason), "{words}");
    }
}

/// Without rights on the device: the reason, and what helps.
#[test]
fn a_kvm_that_is_not_ours_is_told_of() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    let kernel = bench.kernel(&[kernel::print("runs"), kernel::power_off()].concat());
    for folder in [bench.path("."), bench.path("run")] {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_bedplate")]);
        command.args(args).env("XDG_RUNTIME_DIR", bench.path("run")).current_dir(bench.path("."));
        command.stdin(Stdio::null()).output().ok()
    };
    let denied = |output: &Option<Output>| {
        let denied = output.as_ref().is_some_and(|output| said(output).contains("Permission denied"));
        let denied = denied && output.as_ref().is_some_and(|output| said(output).contains("/dev/kvm"));
        if !denied {
            eprintln!("not run: nobody cannot be had, or has rights on /dev/kvm: {output:?}");
        }
        denied
    };
    let output = as_nobody(&run_args(&kernel, &["--engine", "kvm"]));
    if !denied(&output) {
        return;
    }
    assert_eq!(output.unwrap().status.code(), Some(1));
    let output = as_nobody(&run_args(&kernel, &["--engine", "auto"])).unwrap();
    assert_eq!((output.status.code(), &*output.stdout), (Some(0), &b"runs"[..]), "{}", said(&output));
    let doctor = as_nobody(&["doctor"]).unwrap();
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("usermod -aG kvm"), "{doctor:?}");
}

/// A signal to one thread that nobody can catch ends the process, whole: what is left is an exit status, and room for another
/// VM of the name.
#[test]
fn a_cpus_thread_that_is_killed_leaves_nothing_behind() {
    let bench = Bench::new();
    let kernel = bench.kernel(&unhurried());
    let engines = if kvm_here(&bench).is_some() { &["kvm", "soft"][..] } else { &["soft"] };
    for engine in engines {
        for _ in 0..2 {
            let mut vm = bench.start(&run_args(&kernel, &["--name", "victim", "--engine", engine]));
            vm.expect(">");
            let threads = std::fs::read_dir(format!("/proc/{}/task", vm.id())).unwrap();
            let mut threads = threads.map(|thread| thread.unwrap().path());
            let name = |thread: &std::path::PathBuf| std::fs::read_to_string(thread.join("comm")).unwrap();
            let cpu = threads.find(|thread| name(thread).trim() == "vcpu0").expect("it has a CPU's thread");
            let id: i32 = cpu.file_name().unwrap().to_str().unwrap().parse().unwrap();
            // To the thread: the kernel takes the process.
            kill_process(Pid::from_raw(id).unwrap(), Signal::KILL).unwrap();
            assert_eq!(vm.wait().0, -1, "it was killed");
            let status = bench.output(&["ctl", "victim", "status"]);
            assert!(said(&status).contains("no VM called `victim`"), "{}", said(&status));
        }
    }
}

/// A CPU model that was named is given whole or not at all.
#[test]
fn a_cpu_model_that_kvm_lacks_is_refused_with_what_it_lacks() {
    let bench = Bench::new();
    if kvm_here(&bench).is_none() {
        return;
    }
    let kernel = bench.kernel(&[kernel::print("runs"), kernel::power_off()].concat());
    let run = |more: &[&str]| bench.output(&run_args(&kernel, &[&["--engine", "kvm"], more].concat()));
    let (named, unnamed) = (run(&["--cpu-model", "x86-64-v3"]), run(&[]));
    assert_eq!(unnamed.status.code(), Some(0), "{}", said(&unnamed));
    let words = said(&unnamed);
    match words.split_once("the CPU model is x86-64-v3") {
        None => assert_eq!(named.status.code(), Some(0), "{}", said(&named)),
        Some((_, less)) => {
            assert_eq!(named.status.code(), Some(1), "{}", said(&named));
            let lacks = less.lines().next().unwrap().split(",-").skip(1).collect::<Vec<_>>().join(", ");
            let refusal = format!("this engine cannot give the CPU features {}", lacks.trim_end());
            assert!(said(&named).contains(&refusal), "{} / {refusal}", said(&named));
        }
    }
}
