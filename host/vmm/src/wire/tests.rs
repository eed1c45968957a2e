//! Tests of the VM as people write it.

use super::*;

const FULL: &str = r#"
name = "web"
cpus = 2
memory = "512M"
cpu_model = "x86-64-v2,+sha"
engine = "soft"
clock_rate = "1/8"
on_reset = "stop"
on_panic = "keep"
rng = false
serial = ["unix:com1.sock", "none"]
console = ["stdio"]

[boot]
kernel = "vmlinuz"
initrd = "/boot/initrd"
append = "console=ttyS0"

[[disk]]
path = "disk.qcow2"
read_only = true
backing = ["base.raw"]

[[net]]
kind = "user"
hostfwd = ["tcp::2222-:22"]
"#;

#[test]
fn a_full_spec_is_read_and_written_back() {
    let spec = VmSpec::from_toml(FULL).unwrap();
    assert_eq!((spec.cpus, spec.memory), (2, ByteSize(512 << 20)));
    assert_eq!(VmSpec::from_toml(&spec.to_toml()).unwrap(), spec);
    assert_eq!(VmSpec::from_toml("").unwrap(), VmSpec::default());
    let default = VmSpec::default();
    assert_eq!(VmSpec::from_toml(&default.to_toml()).unwrap(), default);
}

#[test]
fn paths_are_relative_to_the_file_and_absolute_when_resolved() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    std::fs::write(&file, FULL).unwrap();
    let spec = VmSpec::load(&file).unwrap().resolve(Path::new("/current")).unwrap();
    let boot = spec.boot.as_ref().unwrap();
    assert_eq!(boot.kernel, folder.path().join("vmlinuz"));
    assert_eq!(boot.initrd.as_deref(), Some(Path::new("/boot/initrd")));
    assert_eq!(spec.disks[0].backing[0], folder.path().join("base.raw"));
    assert_eq!(spec.serial[0], format!("unix:{}", folder.path().join("com1.sock").display()));
    assert_eq!(spec.clone().resolve(Path::new("/elsewhere")).unwrap(), spec);
}

#[test]
fn errors_name_file_and_field() {
    let error = VmSpec::load(Path::new("/no/such/vm.toml")).unwrap_err().to_string();
    assert!(error.contains("/no/such/vm.toml"), "{error}");
    for (text, hint) in [
        ("cpu = 3", "unknown field `cpu`"),
        ("memory = \"lots\"", "`lots` is no size"),
        ("engine = \"kvm2\"", "unknown variant `kvm2`"),
        ("[[disk]]\nread_only = true", "missing field `path`"),
    ] {
        let error = VmSpec::from_toml(text).unwrap_err().to_string();
        assert!(error.contains(hint) && error.contains("line"), "{error}");
    }
    for (text, field) in [
        ("cpus = 0", "cpus"),
        ("cpus = 255", "cpus"),
        ("clock_rate = \"2\"", "clock_rate"),
        ("cpu_model = \"pentium9\"", "cpu_model"),
        ("cpu_model = \"x86-64-v3,sha\"", "cpu_model"),
        ("[[net]]\nkind = \"tap\"\nifname = \"tap0\"", "net.mac"),
        ("memory = \"1M\"", "memory"),
        ("memory = \"1048577K\"", "memory"),
        ("clock_rate = \"0/1\"", "clock_rate"),
        ("name = \"../x\"", "name"),
        ("name = \"\"", "name"),
        ("serial = [\"tcp:1\"]", "serial"),
        ("serial = [\"stdio\", \"stdio\"]", "serial"),
        ("serial = [\"none\",\"none\",\"none\",\"none\",\"none\"]", "serial"),
        ("[[disk]]\npath = \"x\"\nformat = \"vmdk\"", "disk.format"),
        ("[[net]]\nkind = \"tap\"", "net.ifname"),
    ] {
        let error = VmSpec::from_toml(text).unwrap().resolve(Path::new("/")).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{field} = ")), "{text}: {error}");
    }
}

#[test]
fn an_error_in_a_file_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    std::fs::write(&file, "cpus = 999").unwrap();
    let error = VmSpec::load(&file).unwrap_err().to_string();
    assert_eq!(error, format!("{}: cpus = `999`: use 1 to 254", file.display()));
}

#[test]
fn a_resolved_spec_leaves_nothing_to_derive() {
    let tap = "name = \"web\"\n[[net]]\nkind = \"tap\"\nifname = \"tap0\"\n[[disk]]\npath = \"a.qcow2\"";
    let spec = VmSpec::from_toml(tap).unwrap().resolve(Path::new("/")).unwrap();
    assert_eq!(spec.disks[0].format.as_deref(), Some("qcow2"));
    let mac = spec.nets[0].mac.clone().unwrap();
    let renamed = VmSpec { name: Some("other".into()), ..spec }.resolve(Path::new("/")).unwrap();
    assert_eq!(renamed.nets[0].mac.as_ref(), Some(&mac), "the card keeps its address");
}

#[test]
fn all_devices_share_the_slots() {
    let spec = |consoles, rng| VmSpec { consoles: vec!["none".into(); consoles], rng, ..VmSpec::default() };
    assert!(spec(22, true).resolve(Path::new("/")).is_ok());
    assert!(spec(23, false).resolve(Path::new("/")).is_ok());
    let error = spec(23, true).resolve(Path::new("/")).unwrap_err().to_string();
    assert!(error.contains("= `24`") && error.contains("23 slots"), "{error}");
}

#[test]
fn disks_from_the_command_line() {
    let disk = DiskSpec::from_option("a.img,ro,format=qcow2,backing=b.raw").unwrap();
    assert!(disk.read_only);
    assert_eq!(disk.format.as_deref(), Some("qcow2"));
    assert_eq!(disk.to_disk_format().unwrap().backing_allow, [PathBuf::from("b.raw")]);
    assert!(DiskSpec::from_option("a.img,what").unwrap_err().to_string().contains("what"));
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in ".*") {
        let _ = VmSpec::from_toml(&text).map(|spec| spec.resolve(Path::new("/")));
        let _ = NetSpec::from_option(&text);
        let _ = DiskSpec::from_option(&text);
    }
}
