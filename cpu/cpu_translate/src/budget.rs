//! How much memory the translator of a vCPU may have. A VM may have 64 MiB beyond its RAM with one vCPU, and 16 MiB more for each
//! further one; what is not a vCPU's own is in the first 64.

use crate::engine::{Block, ExitSite, Site};
use crate::table::TABLE_BYTES;
use cpu_soft::places::MOST_NUMBERS;

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
/// Of a VM with one vCPU, and for each further one.
const FIRST_BYTES: usize = 64 * MIB;
const FURTHER_BYTES: usize = 16 * MIB;
/// Of the VM: program, stacks, devices (measured: 9 MiB with Debian).
const VM_BYTES: usize = 10 * MIB;
/// Of a vCPU besides what is counted: its thread, holes in the heap, what hot blocks learn.
const OTHER_BYTES: usize = 3 * MIB / 2;
/// Tables of indirect branches that a guest uses much of: its kernel's, its programs', and one more.
const TABLES: usize = 3;

/// Most code: more was not faster.
pub const MOST_CODE: usize = 20 * MIB;
/// Least code.
const LEAST_CODE: usize = 2 * MIB;
/// Records beside a MiB of code. Debian has 4,600, 8,900 and 2,000.
const SITES: usize = 11 << 9;
const EXITS: usize = 10 << 10;
const BLOCKS: usize = 5 << 9;
/// Most blocks.
pub const MOST_BLOCKS: usize = MOST_CODE / MIB * BLOCKS;
const _: () = assert!(MOST_BLOCKS <= MOST_NUMBERS);
/// Bytes of a block in the hash tables of places and of pages: they are not full.
const BLOCK_IN_TABLES: usize = 16;
/// Bytes of what comes with a MiB of code, itself included.
const BYTES_PER_MIB: usize = MIB
    + SITES * size_of::<Site>()
    + EXITS * size_of::<ExitSite>()
    + BLOCKS * (size_of::<Block>() + BLOCK_IN_TABLES);

/// Sizes of one vCPU's translator.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Bytes of code.
    pub code: usize,
    /// Operations kept beside the code.
    pub sites: usize,
    /// Ways out that are remembered.
    pub exits: usize,
    /// Blocks.
    pub blocks: usize,
}

impl Budget {
    /// For each of `vcpus`.
    pub fn of(vcpus: usize) -> Self {
        let vcpus = vcpus.max(1);
        let all = FIRST_BYTES - VM_BYTES + (vcpus - 1) * FURTHER_BYTES;
        let mine =
            (all / vcpus).saturating_sub(cpu_soft::vcpu_bytes(vcpus) + OTHER_BYTES + TABLES * TABLE_BYTES);
        // Whole pages.
        let code = mine * (MIB / PAGE) / BYTES_PER_MIB * PAGE;
        Self::with_code(code.clamp(LEAST_CODE, MOST_CODE))
    }

    /// For so many bytes of code.
    pub fn with_code(code: usize) -> Self {
        let of = |per_mib: usize| code / 1024 * per_mib / 1024;
        Self { code, sites: of(SITES), exits: of(EXITS), blocks: of(BLOCKS) }
    }

    /// Bytes that are resident when it is used up.
    #[cfg(test)]
    fn bytes(self) -> usize {
        self.code
            + self.sites * size_of::<Site>()
            + self.exits * size_of::<ExitSite>()
            + self.blocks * (size_of::<Block>() + BLOCK_IN_TABLES)
            + TABLES * TABLE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_vcpus_stays_within_what_was_promised() {
        for vcpus in 1..=256 {
            let each = Budget::of(vcpus).bytes() + cpu_soft::vcpu_bytes(vcpus) + OTHER_BYTES;
            let most = (64 + 16 * (vcpus - 1)) << 20;
            assert!(VM_BYTES + vcpus * each <= most, "{vcpus} vCPUs of {each} bytes");
        }
        let code = [1, 2, 4, 8, 256].map(|n| Budget::of(n).code >> 10);
        println!("KiB of code: {code:?}, a vCPU's other memory {} KiB", cpu_soft::vcpu_bytes(2) >> 10);
        assert_eq!(code[0], 20 << 10);
        assert!(code.is_sorted_by(|more, less| more >= less) && code[4] > 2 << 10);
    }
}
