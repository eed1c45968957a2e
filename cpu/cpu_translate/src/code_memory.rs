//! Memory for emitted code: shared pages mapped twice, once writable and once executable (W^X).
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
    ///
    /// Shared memory without a file of ours: `perf` looks for names of code (`journal.rs`) in such, and not in a memfd
    /// (Linux, tools/perf/util/map.c, `is_anon_memory`).
    pub fn new(len: usize) -> io::Result<Self> {
        let checked = |p: *mut libc::c_void| match NonNull::new(p.cast::<u8>()) {
            Some(at) if p != libc::MAP_FAILED => Ok(at),
            _ => Err(io::Error::last_os_error()),
        };
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let executable = checked(unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) })?;
        // The same pages once more: that is what an old length of 0 means (mremap(2)).
        // SAFETY: nothing is moved.
        let again = unsafe { libc::mremap(executable.as_ptr().cast(), 0, len, libc::MREMAP_MAYMOVE) };
        let writable = checked(again).and_then(|at| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: it was just mapped, and nothing refers to it.
            match unsafe { libc::mprotect(again, len, protection) } {
                0 => Ok(at),
                _ => {
                    let error = io::Error::last_os_error();
                    // SAFETY: as above.
                    unsafe { libc::munmap(again, len) };
                    Err(error)
                }
            }
        });
        match writable {
            Ok(writable) => Ok(Self { writable, executable, len, used: 0 }),
            Err(error) => {
                // SAFETY: as above.
                unsafe { libc::munmap(executable.as_ptr().cast(), len) };
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What /proc/self/maps says of `address`.
    fn mapping(address: u64) -> String {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let holds = |line: &&str| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            range.is_some_and(|(from, to)| (number(from)..number(to)).contains(&address))
        };
        maps.lines().find(holds).unwrap_or_default().to_string()
    }

    #[test]
    fn pages_are_the_same_and_never_both_writable_and_executable() {
        let mut memory = CodeMemory::new(0x4000).unwrap();
        memory.append(&[0xC3; 5]);
        // SAFETY: it is readable there.
        assert_eq!(unsafe { (memory.start() as *const [u8; 5]).read() }, [0xC3; 5]);
        let (code, data) = (mapping(memory.start()), mapping(memory.writable.as_ptr() as u64));
        assert!(code.contains(" r-xs "), "{code}");
        assert!(data.contains(" rw-s "), "{data}");
    }

    /// By this name `perf` takes memory for such as a map names.
    #[test]
    fn perf_looks_for_names() {
        let memory = CodeMemory::new(0x1000).unwrap();
        let code = mapping(memory.start());
        assert!(code.contains(" /dev/zero"), "{code}");
    }
}
