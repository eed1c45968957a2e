//! Memory for emitted code: one anonymous file mapped twice, once writable and once executable (W^X).
//!
//! It is filled from the front; when it is full the owner drops everything and starts again. The guest
//! cannot name it: guest addresses reach offsets of guest RAM only.

use std::io;
use std::ptr::{self, NonNull};

/// See the module's header.
pub struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    len: usize,
    used: usize,
}

// SAFETY: it owns both mappings.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// `len` bytes (whole pages); pages cost memory when they are first used.
    pub fn new(len: usize) -> io::Result<Self> {
        // SAFETY: plain system calls; every result is checked, and the descriptor is closed once.
        unsafe {
            let name = c"bedplate-code".as_ptr();
            let mut fd = libc::memfd_create(name, libc::MFD_CLOEXEC | libc::MFD_EXEC);
            if fd < 0 {
                // Kernels before 6.3 do not know MFD_EXEC.
                fd = libc::memfd_create(name, libc::MFD_CLOEXEC);
            }
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let result = Self::map(fd, len);
            libc::close(fd);
            result
        }
    }

    fn map(fd: i32, len: usize) -> io::Result<Self> {
        let one = |protection| -> io::Result<NonNull<u8>> {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let p = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
            match NonNull::new(p.cast::<u8>()) {
                Some(at) if p != libc::MAP_FAILED => Ok(at),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: the descriptor is ours.
        if unsafe { libc::ftruncate(fd, len as i64) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let writable = one(libc::PROT_READ | libc::PROT_WRITE)?;
        match one(libc::PROT_READ | libc::PROT_EXEC) {
            Ok(executable) => Ok(Self { writable, executable, len, used: 0 }),
            Err(error) => {
                // SAFETY: it was just mapped, and nothing refers to it.
                unsafe { libc::munmap(writable.as_ptr().cast(), len) };
                Err(error)
            }
        }
    }

    /// Address of the first byte.
    pub fn start(&self) -> u64 {
        self.executable.as_ptr() as u64
    }
    /// Address at which the next [`CodeMemory::append`] will be executable.
    pub fn next(&self) -> u64 {
        self.executable.as_ptr() as u64 + self.used as u64
    }
    /// Bytes left.
    pub fn left(&self) -> usize {
        self.len - self.used
    }
    /// Forgets everything behind the first `keep` bytes.
    pub fn truncate(&mut self, keep: usize) {
        self.used = self.used.min(keep);
    }
    /// Bytes used.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Adds code, which was made for [`CodeMemory::next`]. Panics if there is no room: see `left`.
    pub fn append(&mut self, code: &[u8]) {
        self.write_at(self.used, code);
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.len);
    }

    /// Overwrites bytes at executable address `address`. Panics outside of the memory.
    pub fn patch(&mut self, address: u64, bytes: &[u8]) {
        let offset = address.wrapping_sub(self.executable.as_ptr() as u64);
        self.write_at(offset as usize, bytes);
    }

    /// Where the 32-bit displacement at `address` leads.
    pub fn jump_target(&self, address: u64) -> u64 {
        let offset = address.wrapping_sub(self.executable.as_ptr() as u64) as usize;
        assert!(offset <= self.len && self.len - offset >= 4, "a jump beyond the code");
        // SAFETY: the range was checked; nobody writes now.
        let bytes = unsafe { self.writable.as_ptr().add(offset).cast::<[u8; 4]>().read() };
        (address + 4).wrapping_add(i32::from_le_bytes(bytes) as u64)
    }

    /// Overwrites the 32-bit displacement at `address` so that it leads to `to`.
    pub fn patch_jump(&mut self, address: u64, to: u64) {
        self.patch(address, &(to.wrapping_sub(address + 4) as u32).to_le_bytes());
    }

    /// Does not write what is there already: a processor that sees a store to code it has fetched starts all over, which
    /// takes longer than a thousand instructions.
    fn write_at(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset, "code beyond its memory");
        // SAFETY: the range was checked; it is executed by this vCPU's own thread only, never now.
        unsafe {
            let to = self.writable.as_ptr().add(offset);
            if std::slice::from_raw_parts(to, bytes.len()) != bytes {
                ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            }
        }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours and are not used any more.
        unsafe {
            libc::munmap(self.writable.as_ptr().cast(), self.len);
            libc::munmap(self.executable.as_ptr().cast(), self.len);
        }
    }
}
