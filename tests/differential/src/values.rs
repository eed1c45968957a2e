//! Random numbers, with a taste for corners.

/// A small generator (SplitMix64): a seed names a campaign.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n.max(1)
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of `items`.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// An integer: corner, small, or random.
    pub fn integer(&mut self) -> u64 {
        const CORNERS: [u64; 16] = [
            0,
            1,
            2,
            0x7F,
            0x80,
            0xFF,
            0x7FFF,
            0x8000,
            0xFFFF,
            0x7FFF_FFFF,
            0x8000_0000,
            0xFFFF_FFFF,
            0x7FFF_FFFF_FFFF_FFFF,
            0x8000_0000_0000_0000,
            u64::MAX,
            u64::MAX - 1,
        ];
        match self.below(8) {
            0..3 => self.pick(&CORNERS),
            3 => self.below(80),
            4 => self.below(80).wrapping_neg(),
            5 => 1 << self.below(64),
            _ => self.bits(),
        }
    }

    /// A single-precision number.
    pub fn single(&mut self) -> u32 {
        const CORNERS: [u32; 22] = [
            0,
            0x8000_0000,
            0x3F80_0000,
            0xBF80_0000,
            0x4000_0000,
            1,
            0x8000_0001,
            0x007F_FFFF,
            0x0080_0000,
            0x7F7F_FFFF,
            0xFF7F_FFFF,
            0x7F80_0000,
            0xFF80_0000,
            0x7FC0_0000,
            0xFFC0_1234,
            0x7F80_0001,
            0xFFA5_5555,
            0x4F00_0000,
            0xCF00_0000,
            0x5F00_0000,
            0x3F00_0000,
            0x4B7F_FFFF,
        ];
        match self.below(8) {
            0..3 => self.pick(&CORNERS),
            // Near one another, so that sums cancel and products stay finite.
            3..5 => (120 + self.below(16) as u32) << 23 | self.bits() as u32 & 0x807F_FFFF,
            5 => (self.below(40) as i32 - 20) as f32 as u32,
            6 => ((self.below(2000) as i64 - 1000) as f32 / 4.0).to_bits(),
            _ => self.bits() as u32,
        }
    }

    /// A double-precision number.
    pub fn double(&mut self) -> u64 {
        const CORNERS: [u64; 22] = [
            0,
            1 << 63,
            0x3FF0_0000_0000_0000,
            0xBFF0_0000_0000_0000,
            0x4000_0000_0000_0000,
            1,
            1 << 63 | 1,
            0x000F_FFFF_FFFF_FFFF,
            0x0010_0000_0000_0000,
            0x7FEF_FFFF_FFFF_FFFF,
            0xFFEF_FFFF_FFFF_FFFF,
            0x7FF0_0000_0000_0000,
            0xFFF0_0000_0000_0000,
            0x7FF8_0000_0000_0000,
            0xFFF8_0000_0000_1234,
            0x7FF0_0000_0000_0001,
            0xFFF5_5555_5555_5555,
            0x41E0_0000_0000_0000,
            0xC1E0_0000_0000_0000,
            0x43E0_0000_0000_0000,
            0x3810_0000_0000_0000,
            0x47EF_FFFF_F000_0000,
        ];
        match self.below(8) {
            0..3 => self.pick(&CORNERS),
            3..5 => (1016 + self.below(16)) << 52 | self.bits() & 0x800F_FFFF_FFFF_FFFF,
            5 => ((self.below(2000) as i64 - 1000) as f64 / 4.0).to_bits(),
            6 => (f64::from(f32::from_bits(self.single()))).to_bits(),
            _ => self.bits(),
        }
    }

    /// An extended-precision number, unsupported encodings included.
    pub fn extended(&mut self) -> (u64, u16) {
        const TOP: u64 = 1 << 63;
        const CORNERS: [(u64, u16); 20] = [
            (0, 0),
            (0, 0x8000),
            (TOP, 0x3FFF),
            (TOP, 0xBFFF),
            (TOP, 0x4000),
            (1, 0),
            (TOP - 1, 0x8000),
            (TOP, 0),
            (TOP, 1),
            (u64::MAX, 0x7FFE),
            (u64::MAX, 0xFFFE),
            (TOP, 0x7FFF),
            (TOP, 0xFFFF),
            (TOP | TOP >> 1, 0xFFFF),
            (TOP | TOP >> 1 | 0x1234, 0x7FFF),
            (TOP | 1, 0x7FFF),
            (1, 0x7FFF),
            (0, 0x7FFF),
            (1, 0x3FFF),
            (0, 0xC000),
        ];
        let sign = (self.bits() as u16) & 0x8000;
        match self.below(8) {
            0..3 => self.pick(&CORNERS),
            3..5 => (self.bits() | TOP, sign | (0x3FF8 + self.below(16) as u16)),
            5 => (self.bits() | TOP, sign | (0x3FFF + self.below(66) as u16)),
            6 => {
                // Exactly a small number of quarters.
                let n = 1 + self.below(4000);
                let shift = n.leading_zeros();
                (n << shift, sign | (0x3FFF + 63 - 2 - shift as u16))
            }
            _ => (self.bits(), self.bits() as u16),
        }
    }

    /// A vector register, lanes of one taste.
    pub fn vector(&mut self) -> [u64; 4] {
        let taste = self.below(8);
        core::array::from_fn(|_| match taste {
            0 | 1 => u64::from(self.single()) | u64::from(self.single()) << 32,
            2 | 3 => self.double(),
            4 => self.integer(),
            5 => u64::from(self.integer() as u32) | self.integer() << 32,
            6 => (0..8).fold(0, |acc, _| acc << 8 | self.integer() & 0xFF),
            _ => self.bits(),
        })
    }
}
