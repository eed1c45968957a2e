//! CPUID features: which leaf and bit shows each (SDM vol. 2A, CPUID; AMD APM vol. 3 appendix D/E).

/// Output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum CpuidRegister {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

macro_rules! features {
    ($($name:ident = $leaf:literal, $subleaf:literal, $register:ident, $bit:literal, $text:literal;)*) => {
        /// A processor feature that CPUID shows.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Feature { $($name),* }

        impl Feature {
            /// All features, in the order of the enum.
            pub const ALL: &'static [Feature] = &[$(Feature::$name),*];

            /// Where CPUID shows it: leaf, subleaf, register, bit.
            pub const fn place(self) -> (u32, u32, CpuidRegister, u8) {
                match self { $(Feature::$name => ($leaf, $subleaf, CpuidRegister::$register, $bit)),* }
            }

            /// Its name as people write it (`+name`).
            pub const fn name(self) -> &'static str {
                match self { $(Feature::$name => $text),* }
            }
        }
    };
}

features! {
    Fpu = 1, 0, Edx, 0, "fpu";
    Vme = 1, 0, Edx, 1, "vme";
    De = 1, 0, Edx, 2, "de";
    Pse = 1, 0, Edx, 3, "pse";
    Tsc = 1, 0, Edx, 4, "tsc";
    Msr = 1, 0, Edx, 5, "msr";
    Pae = 1, 0, Edx, 6, "pae";
    Mce = 1, 0, Edx, 7, "mce";
    Cx8 = 1, 0, Edx, 8, "cx8";
    Apic = 1, 0, Edx, 9, "apic";
    Sep = 1, 0, Edx, 11, "sep";
    Mtrr = 1, 0, Edx, 12, "mtrr";
    Pge = 1, 0, Edx, 13, "pge";
    Mca = 1, 0, Edx, 14, "mca";
    Cmov = 1, 0, Edx, 15, "cmov";
    Pat = 1, 0, Edx, 16, "pat";
    Pse36 = 1, 0, Edx, 17, "pse36";
    Clflush = 1, 0, Edx, 19, "clflush";
    Mmx = 1, 0, Edx, 23, "mmx";
    Fxsr = 1, 0, Edx, 24, "fxsr";
    Sse = 1, 0, Edx, 25, "sse";
    Sse2 = 1, 0, Edx, 26, "sse2";
    Htt = 1, 0, Edx, 28, "htt";
    Sse3 = 1, 0, Ecx, 0, "sse3";
    Pclmulqdq = 1, 0, Ecx, 1, "pclmulqdq";
    Ssse3 = 1, 0, Ecx, 9, "ssse3";
    Fma = 1, 0, Ecx, 12, "fma";
    Cx16 = 1, 0, Ecx, 13, "cx16";
    Pcid = 1, 0, Ecx, 17, "pcid";
    Sse41 = 1, 0, Ecx, 19, "sse4.1";
    Sse42 = 1, 0, Ecx, 20, "sse4.2";
    X2apic = 1, 0, Ecx, 21, "x2apic";
    Movbe = 1, 0, Ecx, 22, "movbe";
    Popcnt = 1, 0, Ecx, 23, "popcnt";
    TscDeadline = 1, 0, Ecx, 24, "tsc-deadline";
    Aes = 1, 0, Ecx, 25, "aes";
    Xsave = 1, 0, Ecx, 26, "xsave";
    Avx = 1, 0, Ecx, 28, "avx";
    F16c = 1, 0, Ecx, 29, "f16c";
    Rdrand = 1, 0, Ecx, 30, "rdrand";
    Hypervisor = 1, 0, Ecx, 31, "hypervisor";
    Arat = 6, 0, Eax, 2, "arat";
    Fsgsbase = 7, 0, Ebx, 0, "fsgsbase";
    TscAdjust = 7, 0, Ebx, 1, "tsc-adjust";
    Bmi1 = 7, 0, Ebx, 3, "bmi1";
    Avx2 = 7, 0, Ebx, 5, "avx2";
    Smep = 7, 0, Ebx, 7, "smep";
    Bmi2 = 7, 0, Ebx, 8, "bmi2";
    Erms = 7, 0, Ebx, 9, "erms";
    Invpcid = 7, 0, Ebx, 10, "invpcid";
    Rdseed = 7, 0, Ebx, 18, "rdseed";
    Adx = 7, 0, Ebx, 19, "adx";
    Smap = 7, 0, Ebx, 20, "smap";
    Clflushopt = 7, 0, Ebx, 23, "clflushopt";
    Clwb = 7, 0, Ebx, 24, "clwb";
    Sha = 7, 0, Ebx, 29, "sha";
    Umip = 7, 0, Ecx, 2, "umip";
    Vaes = 7, 0, Ecx, 9, "vaes";
    Vpclmulqdq = 7, 0, Ecx, 10, "vpclmulqdq";
    Gfni = 7, 0, Ecx, 8, "gfni";
    Rdpid = 7, 0, Ecx, 22, "rdpid";
    Fsrm = 7, 0, Edx, 4, "fsrm";
    ArchCapabilities = 7, 0, Edx, 29, "arch-capabilities";
    SpecCtrl = 7, 0, Edx, 26, "spec-ctrl";
    Ssbd = 7, 0, Edx, 31, "ssbd";
    BhiCtrl = 7, 2, Edx, 4, "bhi-ctrl";
    Xsaveopt = 0xD, 1, Eax, 0, "xsaveopt";
    Xsavec = 0xD, 1, Eax, 1, "xsavec";
    Xgetbv1 = 0xD, 1, Eax, 2, "xgetbv1";
    Xsaves = 0xD, 1, Eax, 3, "xsaves";
    LahfLm = 0x8000_0001, 0, Ecx, 0, "lahf-lm";
    Lzcnt = 0x8000_0001, 0, Ecx, 5, "lzcnt";
    Prefetchw = 0x8000_0001, 0, Ecx, 8, "3dnowprefetch";
    Syscall = 0x8000_0001, 0, Edx, 11, "syscall";
    Nx = 0x8000_0001, 0, Edx, 20, "nx";
    Pdpe1gb = 0x8000_0001, 0, Edx, 26, "pdpe1gb";
    Rdtscp = 0x8000_0001, 0, Edx, 27, "rdtscp";
    Lm = 0x8000_0001, 0, Edx, 29, "lm";
    InvariantTsc = 0x8000_0007, 0, Edx, 8, "invtsc";
}

/// A set of [`Feature`]s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet(u128);

impl FeatureSet {
    /// No feature.
    pub const EMPTY: Self = Self(0);

    /// The set of `features`.
    pub const fn of(features: &[Feature]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < features.len() {
            bits |= 1 << features[i] as u8;
            i += 1;
        }
        Self(bits)
    }
    /// Whether `feature` is in it.
    #[inline]
    pub const fn has(self, feature: Feature) -> bool {
        self.0 & (1 << feature as u8) != 0
    }
    /// Whether the feature of that number (`feature as u8`) is in it; there are none above 127.
    #[inline]
    pub const fn has_number(self, number: u8) -> bool {
        number < 128 && self.0 & (1 << number) != 0
    }
    /// Adds `feature`.
    pub fn insert(&mut self, feature: Feature) {
        self.0 |= 1 << feature as u8;
    }
    /// Removes `feature`.
    pub fn remove(&mut self, feature: Feature) {
        self.0 &= !(1 << feature as u8);
    }
    /// All of both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// What `other` has and this lacks.
    #[must_use]
    pub const fn missing_from(self, other: Self) -> Self {
        Self(other.0 & !self.0)
    }
    /// Whether nothing is in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// The features, in order.
    pub fn iter(self) -> impl Iterator<Item = Feature> {
        Feature::ALL.iter().copied().filter(move |f| self.has(*f))
    }
}
