//! Locks on disk images, so that two VMs never share one that either of them writes.
//!
//! Called by: `disk_formats` when it opens an image or a backing file.
//!
//! The scheme is QEMU's (locks of an open file description on single bytes), so a disk in use by QEMU or `qemu-img` is
//! noticed, and they notice ours: a shared lock on byte 100+p for each permission p in use, one on byte 200+p for each
//! permission p not granted to others; a conflict shows as somebody's lock on the opposite byte.
//!
//! Invariants: the lock belongs to the open file description, so it ends with the process however that dies; readers
//! share with readers, a writer shares with nobody, inside one process too.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const USED_BASE: i64 = 100;
const DENIED_BASE: i64 = 200;
/// QEMU's permissions by bit: consistent read, write, write unchanged, resize.
const READ: u8 = 1 << 0;
const ALL: u8 = 0b1111;
const GRANTED_TO_OTHERS: u8 = 1 << 0 | 1 << 2;

/// What an image is locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Others may read too.
    Read,
    /// Nobody else may use the image.
    Write,
}

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub struct ImageLock {
    fd: OwnedFd,
}

impl ImageLock {
    /// Locks the open file `fd`, or says `WouldBlock` when somebody else uses the image in a way that excludes `mode`.
    /// A file system without locks is used without them.
    pub fn acquire(fd: impl AsFd, mode: LockMode) -> io::Result<ImageLock> {
        let lock = ImageLock { fd: fd.as_fd().try_clone_to_owned()? };
        match lock.apply(mode) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                Ok(lock)
            }
            Err(error) => Err(error),
            Ok(()) => Ok(lock),
        }
    }

    /// Lets readers in: the image will not be written through this open file any more.
    pub fn downgrade_to_read(&self) -> io::Result<()> {
        for bit in bits(ALL & !READ) {
            self.set(libc::F_UNLCK, USED_BASE + bit)?;
        }
        Ok(())
    }

    /// Takes the image back for writing after `downgrade_to_read`; says `WouldBlock` if a reader came in meanwhile.
    pub fn upgrade_to_write(&self) -> io::Result<()> {
        self.apply(LockMode::Write)
    }

    fn apply(&self, mode: LockMode) -> io::Result<()> {
        let used = if mode == LockMode::Write { ALL } else { READ };
        let denied = ALL & !GRANTED_TO_OTHERS;
        for at in bits(used).map(|b| USED_BASE + b).chain(bits(denied).map(|b| DENIED_BASE + b)) {
            self.set(libc::F_RDLCK, at)?;
        }
        for at in bits(used).map(|b| DENIED_BASE + b).chain(bits(denied).map(|b| USED_BASE + b)) {
            if self.is_held_by_another(at)? {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }

    fn set(&self, kind: libc::c_int, byte: i64) -> io::Result<()> {
        let request = one_byte(kind, byte);
        // SAFETY: a valid descriptor and a fully initialized flock; the kernel only reads it.
        match unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_SETLK, &request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn is_held_by_another(&self, byte: i64) -> io::Result<bool> {
        let mut request = one_byte(libc::F_WRLCK, byte);
        // SAFETY: a valid descriptor and a fully initialized flock that the kernel may overwrite.
        match unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_GETLK, &mut request) } {
            0 => Ok(request.l_type != libc::F_UNLCK as libc::c_short),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // Other descriptors of the same open file may live on, so closing ours would not unlock.
        for bit in bits(ALL) {
            let _ = self.set(libc::F_UNLCK, USED_BASE + bit);
            let _ = self.set(libc::F_UNLCK, DENIED_BASE + bit);
        }
    }
}

fn bits(mask: u8) -> impl Iterator<Item = i64> {
    (0..4i64).filter(move |bit| mask & 1 << bit != 0)
}

fn one_byte(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn readers_share_and_writers_exclude() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (a, b, c) = (open(), open(), open());

        let first = ImageLock::acquire(&a, LockMode::Read).unwrap();
        let second = ImageLock::acquire(&b, LockMode::Read).unwrap();
        let refused = ImageLock::acquire(&c, LockMode::Write).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop((first, second));

        let writer = ImageLock::acquire(&c, LockMode::Write).unwrap();
        assert!(ImageLock::acquire(&a, LockMode::Read).is_err());
        assert!(ImageLock::acquire(&a, LockMode::Write).is_err());
        writer.downgrade_to_read().unwrap();
        let reader = ImageLock::acquire(&a, LockMode::Read).unwrap();
        assert!(ImageLock::acquire(&b, LockMode::Write).is_err());
        drop((writer, reader));
        ImageLock::acquire(&b, LockMode::Write).unwrap();
    }
}
