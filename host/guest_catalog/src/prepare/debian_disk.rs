//! A Debian system on a disk: mmdebstrap builds it from packages, `mke2fs -d` puts it into an ext4 filesystem
//! inside the image file, our own GPT goes around it. No mount, no loop device; without root it is done in a user
//! namespace (which needs the uidmap package).
//!
//! The system is Debian as it comes: systemd, a getty on the serial console, DHCP; root's password is `bedplate`.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use super::{Place, stage, stage_kernel};
use crate::error::{CatalogError, IoContext};
use crate::fetch::apt;
use crate::gpt;
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::tools;

/// What to build.
pub(crate) struct Disk<'a> {
    pub(crate) suite: &'a str,
    pub(crate) kernel: &'a str,
    pub(crate) mib: u32,
}

/// Beyond what every Debian has: what the trials use inside, and what makes an image pleasant over a console.
const PACKAGES: &str = "initramfs-tools,lz4,systemd-sysv,udev,dbus,libpam-systemd,kmod,iproute2,iputils-ping,\
    ifupdown,isc-dhcp-client,netbase,ca-certificates,wget,less,procps,e2fsprogs,\
    stress-ng,acpica-tools,cpuid,dmidecode,virt-what,memtester";

/// Before packages are configured: what the initramfs is built with, stable interface names, and no housekeeping
/// timers (they would run in the middle of a trial).
const BEFORE: &str = r#"set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d" "$1/etc/systemd/network"
printf 'MODULES=list\nCOMPRESS=lz4\n' > "$1/etc/initramfs-tools/conf.d/bedplate"
printf 'virtio_pci\nvirtio_blk\nvirtio_net\nvirtio_console\nvirtio_rng\next4\n' > "$1/usr/share/initramfs-tools/modules.d/bedplate"
ln -sf /dev/null "$1/etc/systemd/network/99-default.link"
mkdir -p "$1/etc/systemd/system"
for unit in e2scrub_reap.service e2scrub_all.timer apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer; do
    ln -sf /dev/null "$1/etc/systemd/system/$unit"
done
ln -sf /lib/systemd/system/multi-user.target "$1/etc/systemd/system/default.target"
"#;

/// After everything is installed.
const AFTER: &str = r#"set -eu
echo bedplate > "$1/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 bedplate\n' > "$1/etc/hosts"
printf 'LABEL=bedplate-root / ext4 errors=remount-ro 0 1\n' > "$1/etc/fstab"
printf 'auto lo\niface lo inet loopback\n\nallow-hotplug eth0\niface eth0 inet dhcp\n' > "$1/etc/network/interfaces"
echo 'root:bedplate' | chroot "$1" chpasswd
rm -f "$1/etc/resolv.conf"
: > "$1/etc/machine-id"
"#;

const SCRIPT: &str = include_str!("debian_disk.sh");
/// All that says what is on a disk.
pub(super) const SCRIPTS: [&str; 4] = [PACKAGES, BEFORE, AFTER, SCRIPT];
const BLOCK: u64 = 4096;
/// Fixed, so that equal packages give equal archives (2026-01-01).
const SOURCE_DATE_EPOCH: &str = "1767225600";

pub(crate) fn prepare(
    disk: &Disk<'_>,
    place: &Place<'_>,
    progress: &mut dyn Progress,
) -> Result<Manifest, CatalogError> {
    tools::MKE2FS.find()?;
    let archive = place.work.join("system.tar");
    build_system(disk, place, &archive, progress)?;

    progress.step("make the disk", None);
    let image = place.staged.join("disk.raw");
    let bytes = u64::from(disk.mib) << 20;
    let mut file = File::create(&image).context("create", &image)?;
    file.set_len(bytes).context("size", &image)?;
    let parts = place.work.join("parts");
    let script = place.work.join("debian_disk.sh");
    fs::write(&script, SCRIPT).context("write", &script)?;
    let blocks = (bytes - gpt::PARTITION_START_BYTES - gpt::TAIL_BYTES) / BLOCK;
    let mut command = as_root_of_a_namespace()?;
    command.arg("sh").args([&script, &archive, &parts, &image]);
    command.args([gpt::PARTITION_START_BYTES.to_string(), blocks.to_string()]);
    command.env("E2FSPROGS_FAKE_TIME", SOURCE_DATE_EPOCH);
    tools::run(command, &place.work.join("disk.log"), "", &mut || progress.at(0))?;
    gpt::write_table(&mut file, bytes, "root").context("partition", &image)?;
    file.sync_all().context("write", &image)?;

    let mut manifest =
        Manifest { packages: vec![format!("mmdebstrap {}", disk.suite)], ..Manifest::default() };
    stage_kernel(&mut manifest, place, &parts.join("vmlinuz"), progress)?;
    stage(&mut manifest, place, "initrd", &parts.join("initrd.img"), "initrd.img")?;
    progress.step("checksum the disk", None);
    manifest.add("disk-raw", place.staged, "disk.raw")?;
    Ok(manifest)
}

fn build_system(
    disk: &Disk<'_>,
    place: &Place<'_>,
    archive: &Path,
    progress: &mut dyn Progress,
) -> Result<(), CatalogError> {
    progress.step(&format!("build Debian {} from its packages", disk.suite), None);
    let mut build = tools::MMDEBSTRAP.command()?;
    build.env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH);
    build.args(["--variant=minbase", "--format=tar", "--mode=auto", "--architectures=amd64"]);
    build.arg(format!("--include={},{PACKAGES}", disk.kernel));
    for folder in ["doc", "man", "locale", "info"] {
        build.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
    }
    build.arg(format!("--essential-hook={BEFORE}")).arg(format!("--customize-hook={AFTER}"));
    build.arg(disk.suite).arg(archive);
    // Without any, mmdebstrap falls back to the project's own mirrors.
    build.args(apt::source_files(disk.suite));
    let hint = "Without root this needs user namespaces: apt-get install uidmap";
    tools::run(build, &place.work.join("mmdebstrap.log"), hint, &mut || {
        progress.at(fs::metadata(archive).map_or(0, |meta| meta.len()));
    })
}

/// Files of the system belong to many users: unpacking them takes root, real or of a user namespace.
fn as_root_of_a_namespace() -> Result<Command, CatalogError> {
    let root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    let mut command = if root {
        let mut plain = Command::new("env");
        plain.stdin(std::process::Stdio::null());
        plain
    } else {
        let mut helper = tools::MMDEBSTRAP.command()?;
        helper.arg("--unshare-helper");
        helper
    };
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    Ok(command)
}
