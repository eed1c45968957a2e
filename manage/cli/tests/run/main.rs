//! The command as a process, from its command line to its exit code, with kernels of a few bytes.

mod bench;
mod jail;
mod kvm;
mod terminal;

use bench::{Bench, counter, run_args};
use machine::testing::kernel;
use rustix::process::{Pid, Signal, kill_process};

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_guest_prints_and_powers_off() {
    let code = [kernel::print("hello, host\r\n"), kernel::power_off()].concat();
    let output = Bench::new().run(&code, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output.stderr));
    assert_eq!(said(&output.stdout), "hello, host\r\n");
    assert!(said(&output.stderr).contains("powered off"));
}

#[test]
fn ends_have_their_exit_codes_and_sentences() {
    let bench = Bench::new();
    // UD2 with an empty IDT.
    let output = bench.run(&[0x0F, 0x0B], &[]);
    assert_eq!(output.status.code(), Some(21), "{}", said(&output.stderr));
    assert!(said(&output.stderr).contains("triple fault on CPU 0"));
    assert!(said(&output.stderr).contains("rip 10:100000"));

    // Port CF9.
    let reset = [&[0x66, 0xBA, 0xF9, 0x0C, 0xB0, 0x06, 0xEE][..], &kernel::IDLE].concat();
    let output = bench.run(&reset, &["--on-reset", "stop"]);
    assert_eq!(output.status.code(), Some(23), "{}", said(&output.stderr));

    let words = "[    1.0] Kernel panic - not syncing: no root\r\n[    1.1] ---[ end Kernel panic ]---\r\n";
    let output = bench.run(&[kernel::print(words), kernel::IDLE.into()].concat(), &[]);
    assert_eq!(output.status.code(), Some(22), "{}", said(&output.stderr));
    assert!(said(&output.stderr).contains("panicked: no root"));
    let output = bench.run(&[kernel::print(words), reset].concat(), &[]);
    assert_eq!(output.status.code(), Some(22), "a reset after a panic: {}", said(&output.stderr));
}

#[test]
fn a_reset_starts_the_kernel_again_in_clean_memory() {
    // Prints the byte at 300000h, then the first time sets it and resets.
    let mut code = vec![0xBB, 0x00, 0x00, 0x30, 0x00]; // mov ebx, 300000h
    code.extend([0x8A, 0x03, 0x04, b'0', 0x66, 0xBA, 0xF8, 0x03, 0xEE]); // mov al, [ebx]; add al, '0'; out
    code.extend([0xFE, 0x03]); // inc byte [ebx]
    code.extend([0x66, 0xBA, 0xF9, 0x0C, 0xB0, 0x06, 0xEE]); // reset
    code.extend(kernel::IDLE);
    let bench = Bench::new();
    let kernel = bench.kernel(&code);
    let mut vm = bench.start(&run_args(&kernel, &["--name", "again"]));
    vm.expect("000");
    assert!(bench.output(&["ctl", "again", "kill"]).status.success());
    assert_eq!(vm.wait().0, 20);
}

#[test]
fn a_signal_ends_the_vm_in_order() {
    let bench = Bench::new();
    let kernel = bench.kernel(&counter());
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut vm = bench.start(&run_args(&kernel, &[]));
        vm.expect(">");
        let process = Pid::from_raw(vm.id() as i32).expect("a process");
        kill_process(process, signal).unwrap();
        assert_eq!(vm.wait().0, 20, "{signal:?}");
    }
}

#[test]
fn a_running_vm_is_looked_after() {
    let bench = Bench::new();
    let kernel = bench.kernel(&counter());
    let mut vm = bench.start(&run_args(&kernel, &["--name", "web", "--cpus", "2"]));
    vm.expect(">");
    let list = said(&bench.output(&["ps"]).stdout);
    assert!(
        list.contains("web") && list.contains(&vm.id().to_string()) && list.contains("running"),
        "{list}"
    );
    let ctl = |what: &[&str]| {
        let output = bench.output(&[&["ctl", "web"], what].concat());
        (output.status.success(), said(&output.stdout) + &said(&output.stderr))
    };
    assert_eq!(ctl(&["pause"]), (true, "web is paused\n".into()));
    assert_eq!(ctl(&["pause"]), (true, "web is paused\n".into()));
    let (_, status) = ctl(&["status", "--json"]);
    assert!(status.contains(r#""state":"paused""#) && status.contains(r#""cpus":2"#), "{status}");
    assert_eq!(ctl(&["resume"]), (true, "web is running\n".into()));
    vm.send("x");
    vm.expect("1");

    let twin = bench.output(&run_args(&kernel, &["--name", "web", "--serial", "none"]));
    assert_eq!(twin.status.code(), Some(1));
    assert!(said(&twin.stderr).contains("already running"), "{}", said(&twin.stderr));

    assert!(ctl(&["kill"]).0);
    let (code, words) = vm.wait();
    assert_eq!(code, 20, "{words}");
    let (ok, words) = ctl(&["status"]);
    assert!(!ok && words.contains("no VM called `web`"), "{words}");
    assert_eq!(said(&bench.output(&["ps", "--json"]).stdout), "[]\n");
}

#[test]
fn a_saved_vm_goes_on_in_a_new_process() {
    let bench = Bench::new();
    let (kernel, disk, file) = (bench.kernel(&counter()), bench.disk(), bench.path("vm.saved"));
    let (disk, file) = (disk.to_str().unwrap(), file.to_str().unwrap());
    let mut vm = bench.start(&run_args(&kernel, &["--name", "one", "--disk", disk, "--cpus", "2"]));
    vm.expect(">");
    vm.send("x");
    vm.expect("1");
    let output = bench.output(&["ctl", "one", "save", "--compress", file]);
    assert!(output.status.success(), "{}", said(&output.stderr));
    assert_eq!(vm.wait().0, 0);

    let mut vm = bench.start(&["run", "--restore", file, "--name", "two"]);
    vm.send("x");
    vm.expect("2");
    vm.send("xq");
    vm.expect("3");
    let (code, words) = vm.wait();
    assert_eq!(code, 0, "{words}");

    // Twice is fine, as long as the disk is as it was; then no more.
    std::fs::write(disk, vec![1; 1 << 20]).unwrap();
    let output = bench.output(&["run", "--restore", file]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output.stderr).contains("written since the VM was saved"), "{}", said(&output.stderr));
    std::fs::write(disk, vec![1; 2 << 20]).unwrap();
    assert!(said(&bench.output(&["run", "--restore", file]).stderr).contains("its size is another"));
}

#[test]
fn a_disk_that_was_moved_is_taken_only_if_that_is_said() {
    let bench = Bench::new();
    let (kernel, disk, file) = (bench.kernel(&counter()), bench.disk(), bench.path("vm.saved"));
    let (disk, file) = (disk.to_str().unwrap(), file.to_str().unwrap());
    let mut vm = bench.start(&run_args(&kernel, &["--name", "moved", "--disk", disk]));
    vm.expect(">");
    assert!(bench.output(&["ctl", "moved", "save", file]).status.success());
    assert_eq!(vm.wait().0, 0);

    let copy = bench.path("copy");
    std::fs::copy(disk, &copy).unwrap();
    let changed = std::fs::metadata(disk).unwrap().modified().unwrap();
    let set_changed =
        |time| std::fs::File::options().write(true).open(&copy).unwrap().set_modified(time).unwrap();
    set_changed(changed);
    std::fs::rename(&copy, disk).unwrap();
    let refused = bench.output(&["run", "--restore", file]);
    assert!(
        said(&refused.stderr).contains("it is another file (one that was moved"),
        "{}",
        said(&refused.stderr)
    );
    let mut vm = bench.start(&["run", "--restore", file, "--disks-moved"]);
    vm.send("xq");
    vm.expect("1");
    assert_eq!(vm.wait().0, 0);

    std::fs::copy(disk, &copy).unwrap();
    set_changed(changed + std::time::Duration::from_secs(1));
    std::fs::rename(&copy, disk).unwrap();
    let refused = bench.output(&["run", "--restore", file, "--disks-moved"]);
    assert!(said(&refused.stderr).contains("written since the VM was saved"), "{}", said(&refused.stderr));
}

#[test]
fn a_vm_that_was_saved_with_continue_goes_on_in_overlays() {
    let bench = Bench::new();
    let (kernel, disk, file) = (bench.kernel(&counter()), bench.disk(), bench.path("vm.saved"));
    let (disk, file) = (disk.to_str().unwrap(), file.to_str().unwrap());
    let mut vm = bench.start(&run_args(&kernel, &["--name", "one", "--disk", disk]));
    vm.expect(">");
    let output = bench.output(&["ctl", "one", "save", "--continue", file]);
    assert!(output.status.success(), "{}", said(&output.stderr));
    let option = format!("--disk {disk}.1.qcow2,format=qcow2,backing={disk}\n");
    assert!(said(&output.stdout).ends_with(&option), "{}", said(&output.stdout));
    assert!(bench.path("disk.raw.1.qcow2").exists());
    vm.send("x");
    vm.expect("1");
    // A second one names the overlay.
    let second = bench.path("second.saved");
    assert!(bench.output(&["ctl", "one", "save", second.to_str().unwrap()]).status.success());
    assert_eq!(vm.wait().0, 0);
    for (file, digit) in [(second.to_str().unwrap(), "2"), (file, "1")] {
        let mut vm = bench.start(&["run", "--restore", file]);
        vm.send("x");
        vm.expect(digit);
        vm.send("q");
        let (code, words) = vm.wait();
        assert_eq!(code, 0, "{file}: {words}");
        // The first one's disk is what the overlay is based on: it goes on in another.
        assert_eq!(words.contains("disk.raw stays as it is"), digit == "1", "{words}");
    }
    assert!(bench.path("disk.raw.2.qcow2").exists());
    let mut vm = bench.start(&run_args(&kernel, &["--disk", option["--disk ".len()..].trim_end()]));
    vm.expect(">");
    vm.send("q");
    assert_eq!(vm.wait().0, 0);
}

#[test]
fn a_save_replaces_nothing_but_a_save_and_is_its_owners() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let bench = Bench::new();
    let (kernel, disk, file) = (bench.kernel(&counter()), bench.disk(), bench.path("vm.saved"));
    std::os::unix::fs::symlink(&disk, bench.path("link")).unwrap();
    std::fs::hard_link(&disk, bench.path("hard")).unwrap();
    std::fs::write(bench.path("letter"), "dear").unwrap();
    std::fs::create_dir(bench.path("folder")).unwrap();
    let mut vm = bench.start(&run_args(&kernel, &["--name", "one", "--disk", disk.to_str().unwrap()]));
    vm.expect(">");
    let save = |name: &str| {
        let output = bench.output(&["ctl", "one", "save", "--continue", name]);
        (output.status.success(), said(&output.stderr))
    };
    // A disk may begin with anything.
    std::fs::write(&disk, [&b"BEDPLATE"[..], &vec![0; (1 << 20) - 8]].concat()).unwrap();
    for name in ["kernel", "disk.raw", "link", "hard"] {
        let (ok, words) = save(name);
        assert!(!ok && words.contains(name) && words.contains("the VM itself uses"), "{name}: {words}");
    }
    let (ok, words) = save("letter");
    assert!(!ok && words.contains("no saved VM"), "{words}");
    let (ok, words) = save("folder");
    assert!(!ok && words.contains("it is a folder"), "{words}");
    let (ok, words) = save("no/such/vm.saved");
    assert!(!ok && words.contains("no/such/vm.saved: No such file"), "{words}");
    assert_eq!(std::fs::read(bench.path("letter")).unwrap(), b"dear");
    assert!(!bench.path("disk.raw.1.qcow2").exists());

    assert!(save("vm.saved").0);
    let first = std::fs::metadata(&file).unwrap();
    assert_eq!(first.permissions().mode() & 0o777, 0o600);
    for name in ["disk.raw", "disk.raw.1.qcow2"] {
        let (ok, words) = save(name);
        assert!(!ok && words.contains("the VM itself uses"), "{name}: {words}");
    }
    assert!(save("vm.saved").0);
    assert_ne!(std::fs::metadata(&file).unwrap().ino(), first.ino());
    assert!(bench.output(&["ctl", "one", "kill"]).status.success());
    assert_eq!(vm.wait().0, 20);
}

#[test]
fn damaged_saved_vms_are_refused_with_the_reason() {
    let bench = Bench::new();
    let (kernel, file) = (bench.kernel(&counter()), bench.path("vm.saved"));
    let mut vm = bench.start(&run_args(&kernel, &["--name", "one"]));
    vm.expect(">");
    assert!(bench.output(&["ctl", "one", "save", file.to_str().unwrap()]).status.success());
    vm.wait();
    let saved = std::fs::read(&file).unwrap();
    let refusal = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let output = bench.output(&["run", "--restore", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        let words = said(&output.stderr);
        assert!(words.contains("vm.saved"), "{words}");
        words
    };
    assert!(refusal(&saved[..saved.len() / 2]).contains("cut off"));
    assert!(refusal(&saved[..saved.len() - 1]).contains("cut off"));
    assert!(refusal(b"BEDPLANT").contains("does not begin with BEDPLATE"));
    let mut flipped = saved.clone();
    let middle = saved.len() / 2;
    flipped[middle] ^= 4;
    assert!(refusal(&flipped).contains("checksum"));
    assert!(refusal(&[]).contains("cut off"));
}

#[test]
fn mistakes_name_the_file_or_field_and_the_way_out() {
    let bench = Bench::new();
    let failed = |args: &[&str]| {
        let output = bench.output(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        said(&output.stderr)
    };
    assert!(failed(&["run"]).contains("--kernel"));
    assert!(failed(&["run", "no-such.toml"]).contains("no-such.toml"));
    let missing = failed(&["run", "--kernel", "nowhere/vmlinuz"]);
    assert_eq!(missing.matches("No such file").count(), 1, "{missing}");
    std::fs::write(bench.path("wrong.toml"), "cpus = \"many\"").unwrap();
    let wrong = failed(&["run", "wrong.toml"]);
    assert_eq!(wrong.matches("invalid type").count(), 1, "{wrong}");
    // The last line: above it may stand why the engine is not the host's KVM.
    let end = failed(&["run", "--json", "--kernel", "nowhere/vmlinuz"]);
    let json: serde_json::Value = serde_json::from_str(end.lines().last().unwrap()).unwrap();
    assert_eq!(json["code"], 1);
    assert!(json["message"].as_str().unwrap().contains("nowhere/vmlinuz"), "{json}");
    let json: serde_json::Value =
        serde_json::from_str(&failed(&["ctl", "nobody", "status", "--json"])).unwrap();
    assert!(json["message"].as_str().unwrap().contains("`nobody`"), "{json}");
    assert!(missing.contains("nowhere/vmlinuz") && missing.contains("No such file"), "{missing}");
    assert!(!missing.contains("kernel kernel"), "{missing}");
    std::fs::write(bench.path("text"), "no kernel at all").unwrap();
    let wrong = failed(&["run", "--kernel", "text"]);
    assert!(wrong.contains("/text: kernel: ") && wrong.contains("bzImage"), "{wrong}");
    let kernel = bench.kernel(&kernel::IDLE);
    assert!(failed(&run_args(&kernel, &["--disk", "gone.img"])).contains("gone.img"));
    let model = failed(&run_args(&kernel, &["--cpu-model", "pentium9"]));
    assert!(model.contains("pentium9") && model.contains("x86-64-v3"), "{model}");
    assert!(failed(&run_args(&kernel, &["--net", "user,hostfwd=sctp::1-:2"])).contains("hostfwd"));
    assert!(failed(&["run", "--restore", "gone.saved"]).contains("gone.saved"));
    assert_eq!(bench.output(&["run", "--cpus", "many"]).status.code(), Some(2));
    assert_eq!(bench.output(&["run", "--restore", "x", "--cpus", "2"]).status.code(), Some(2));
}

#[test]
fn a_dry_run_prints_a_spec_that_runs() {
    let bench = Bench::new();
    let kernel = bench.kernel(&[kernel::print("spec"), kernel::power_off()].concat());
    let output = bench.output(&run_args(&kernel, &["--dry-run", "--cpus", "2", "--net", "user"]));
    assert!(output.status.success());
    std::fs::write(bench.path("vm.toml"), &output.stdout).unwrap();
    let again = bench.output(&["run", "vm.toml", "--dry-run"]);
    assert_eq!(said(&again.stdout), said(&output.stdout));
    let output = bench.output(&["run", "vm.toml", "--json"]);
    assert_eq!(said(&output.stdout), "spec");
    let end = said(&output.stderr);
    let end: serde_json::Value = serde_json::from_str(end.lines().last().unwrap()).unwrap();
    assert_eq!((&end["code"], &end["message"]), (&0.into(), &"the guest powered off".into()));
    assert!(end["instructions"].as_u64().unwrap() > 0, "{end}");
    assert!(said(&bench.output(&["run", "vm.toml", "--dry-run"]).stdout).contains("mac = \"52:54:00:"));
    for more in [["--disk", "gone.img"], ["--cpu-model", "foo"], ["--clock-rate", "2"]] {
        let refused = bench.output(&[&["run", "vm.toml", "--dry-run"], &more[..]].concat());
        assert_eq!(refused.status.code(), Some(1), "{more:?}");
        assert!(said(&refused.stderr).contains(more[1]), "{}", said(&refused.stderr));
    }
    let json = said(&bench.output(&["run", "vm.toml", "--dry-run", "--json"]).stdout);
    assert!(json.starts_with('{') && json.contains(r#""cpus":2"#), "{json}");
}

#[test]
fn completions_for_every_shell() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(said(&bench.output(&["completion", shell]).stdout).contains("bedplate"), "{shell}");
    }
    // A reader that is gone already.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = bench.command(&["completion", "bash"]).stdout(writer).output().unwrap();
    assert!(output.status.success(), "{}", said(&output.stderr));
}

#[test]
fn a_listing_of_what_is_translated_and_an_engine_that_translates_nothing() {
    let bench = Bench::new();
    let turns = [0xB9, 0x10, 0x27, 0, 0, 0x49, 0x75, 0xFD]; // mov ecx, 10000; top: dec ecx; jnz top
    let code = [&turns[..], &kernel::power_off()].concat();
    let listing = bench.path("blocks");
    let words = |engine| ["--trace-blocks", listing.to_str().unwrap(), "--engine", engine];
    let output = bench.run(&code, &words("soft,tier=interp"));
    assert_eq!(output.status.code(), Some(0), "{}", said(&output.stderr));
    assert!(
        said(&output.stderr).contains("stay empty under engine soft,tier=interp"),
        "{}",
        said(&output.stderr)
    );
    assert_eq!(std::fs::read_to_string(&listing).unwrap(), "");
    let output = bench.run(&code, &words("soft"));
    assert!(!said(&output.stderr).contains("stay empty"), "{}", said(&output.stderr));
    // 32-bit code is translated, too.
    let listed = std::fs::read_to_string(&listing).unwrap();
    assert!(listed.contains("Dec_r32\n"), "{listed}");
    let output = bench.run(&code, &["--trace-blocks", "/nowhere/blocks"]);
    assert_ne!(output.status.code(), Some(0));
    assert!(said(&output.stderr).contains("/nowhere/blocks: No such file"), "{}", said(&output.stderr));
}
