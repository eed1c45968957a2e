//! Sessions on paper: the initrd and the QEMU command that they become.

use super::*;

fn lab(folder: &Path) -> Lab {
    let initrd = folder.join("ground.cpio");
    let mut cpio = CpioWriter::new(Vec::new());
    cpio.file("bin", b"busybox").unwrap();
    fs::write(&initrd, cpio.finish().unwrap()).unwrap();
    let ground = Prepared {
        guest: GROUND,
        kernel: "/g/vmlinuz".into(),
        vmlinux: None,
        initrd: Some(initrd),
        disk: None,
        append: "",
        version: "6".into(),
        packages: Vec::new(),
        folder: "/g".into(),
    };
    Lab { qemu: "qemu".into(), ground, bedplate: "/b/bedplate".into() }
}

fn session() -> Session {
    let mut command = Command::new("bedplate");
    command.args(["run", "--append", "it's a line"]);
    let mut session = Session::of(&[command]);
    session.share_folder_of(Path::new("/d/one,two/disk.raw"), false);
    session.share_folder_of(Path::new("/d/one,two/other.raw"), true);
    session.ports.push(2222);
    session
}

#[test]
fn the_session_is_behind_the_ground_in_the_initrd() {
    let folder = tempfile::tempdir().unwrap();
    let place = Folder(folder.path().to_path_buf());
    lab(folder.path()).command(&session(), &place).unwrap();
    let archive = fs::read(place.initrd()).unwrap();
    let second = guest_catalog::cpio::entries(&archive[ARCHIVE_ALIGN..]).unwrap();
    let find = |path: &str| {
        let entry = second.iter().find(|entry| entry.path == path).unwrap();
        String::from_utf8(entry.data.to_vec()).unwrap()
    };
    assert!(find("lab/init").starts_with("#!/bin/busybox sh") && find("lab/init").contains(READY));
    assert!(find("lab/session").contains(r"'bedplate' 'run' '--append' 'it'\''s a line' <&3"));
    assert_eq!(find("lab/shares"), "share0 rw,cache=none /d/one,two\nshare1 ro,cache=loose /b\n");
    assert_eq!(find("lab/bedplate"), "/b/bedplate");
}

#[test]
fn qemu_is_told_of_folders_ports_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let place = Folder(folder.path().to_path_buf());
    let words = |session: &Session| {
        let command = lab(folder.path()).command(session, &place).unwrap();
        command.get_args().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    };
    let all = words(&session());
    assert!(all.contains("id=share0,path=/d/one,,two,security_model=none,multidevs=remap -device"), "{all}");
    assert!(all.contains("id=share1,path=/b,security_model=none,multidevs=remap,readonly=on"), "{all}");
    assert!(all.contains("hostfwd=tcp:127.0.0.1:2222-:2222") && all.contains("stdio,signal=off,id=console"));
    let all = words(&Session { ends: Ends::Terminal, ..session() });
    assert!(all.contains("chardev:terminal") && !all.contains("bedplate.console"), "{all}");
}

#[test]
fn files_of_the_host_are_in_the_initrd_below_their_folders() {
    let folder = tempfile::tempdir().unwrap();
    let place = Folder(folder.path().to_path_buf());
    let file = folder.path().join("payload.elf");
    fs::write(&file, b"elf").unwrap();
    let session = Session { files: vec![file.clone()], counts_instructions: true, ..session() };
    let command = lab(folder.path()).command(&session, &place).unwrap();
    assert!(command.get_args().any(|word| word == "shift=0,sleep=off"));
    let archive = fs::read(place.initrd()).unwrap();
    let entries = guest_catalog::cpio::entries(&archive[ARCHIVE_ALIGN..]).unwrap();
    let at = |path: &Path| {
        let name = path.to_str().unwrap().trim_start_matches('/');
        entries.iter().position(|entry| entry.path == name).unwrap()
    };
    assert!(at(folder.path()) < at(&file) && entries[at(&file)].data == b"elf");
}

#[test]
fn a_second_command_follows_one_that_ended_well() {
    let script = Session::of(&[Command::new("one"), Command::new("two")]).script;
    assert!(script.ends_with("'one' <&3 >&3 2>&4 3>&- 4>&- &&\n'two' <&3 >&3 2>&4 3>&- 4>&-\n"), "{script}");
}

#[test]
fn a_path_with_a_blank_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut session = session();
    session.share_folder_of(Path::new("/my disks/disk.raw"), false);
    let place = Folder(folder.path().to_path_buf());
    assert!(lab(folder.path()).command(&session, &place).unwrap_err().to_string().contains("/my disks"));
}

#[test]
fn statuses_come_through_and_are_told_from_qemus_own() {
    let through = |status: i32| ((status + 1) << 1) | 1;
    assert_eq!([0, 1, 22, 126].map(|n| status_of(through(n))), [Some(0), Some(1), Some(22), Some(126)]);
    // Power-off; QEMU's own errors.
    assert_eq!([0, 1, 2].map(status_of), [None; 3]);
}
