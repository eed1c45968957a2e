//! The encodings of floating-point numbers (SDM vol. 1, 4.2.2 and 4.8).

use crate::real::{Real, widen};
use rustc_apfloat::Float;
use rustc_apfloat::ieee::{Double, Half, Single, X87DoubleExtended};

/// A format in memory or registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Half,
    Single,
    Double,
    Extended,
}

impl Format {
    /// Bits behind the point.
    pub fn fraction_bits(self) -> u32 {
        match self {
            Self::Half => 10,
            Self::Single => 23,
            Self::Double => 52,
            Self::Extended => 63,
        }
    }
    fn exponent_bits(self) -> u32 {
        match self {
            Self::Half => 5,
            Self::Single => 8,
            Self::Double => 11,
            Self::Extended => 15,
        }
    }
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::Half => 2,
            Self::Single => 4,
            Self::Double => 8,
            Self::Extended => 10,
        }
    }
    /// The exponent field of infinities and NaNs; the bias is half of it.
    pub fn top_exponent(self) -> u32 {
        (1 << self.exponent_bits()) - 1
    }
    /// Puts a number together; the fraction has the format's width.
    pub fn encode(self, negative: bool, exponent: u32, fraction: u64) -> u128 {
        let bits = u128::from(fraction);
        let (at, integer) = if self == Self::Extended {
            (64, u128::from(exponent != 0) << 63)
        } else {
            (self.fraction_bits(), 0)
        };
        u128::from(negative) << (at + self.exponent_bits()) | u128::from(exponent) << at | integer | bits
    }
    /// Zero with a sign.
    pub fn zero(self, negative: bool) -> u128 {
        self.encode(negative, 0, 0)
    }
    /// Infinity with a sign.
    pub fn infinity(self, negative: bool) -> u128 {
        self.encode(negative, self.top_exponent(), 0)
    }
    /// The QNaN floating-point indefinite: the response to an invalid operation.
    pub fn indefinite(self) -> u128 {
        self.nan(true, 0)
    }
    /// A quiet NaN with the upper bits of a payload of 63 bits.
    pub fn nan(self, negative: bool, payload: u64) -> u128 {
        let quiet = 1 << (self.fraction_bits() - 1);
        self.encode(negative, self.top_exponent(), payload >> (63 - self.fraction_bits()) | quiet)
    }
}

/// What kind of number an encoding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Zero,
    Denormal,
    Normal,
    Infinite,
    Quiet,
    Signaling,
    /// An 80-bit encoding that the 8087 understood: an integer bit that contradicts the exponent.
    Unsupported,
}

/// A decoded number.
#[derive(Clone, Copy, Debug)]
pub struct Value {
    pub format: Format,
    pub class: Class,
    pub negative: bool,
    /// Significand of 64 bits as an x87 register would have it: decides between two NaNs.
    pub significand: u64,
    /// The number; a NaN if it is none.
    pub real: Real,
}

impl Value {
    /// Decodes `bits`.
    pub fn new(format: Format, bits: u128) -> Self {
        let width = format.fraction_bits();
        let fraction = bits as u64 & ((1 << width) - 1);
        let at = if format == Format::Extended { 64 } else { width };
        let exponent = (bits >> at) as u32 & format.top_exponent();
        let integer = if format == Format::Extended { bits >> 63 & 1 != 0 } else { exponent != 0 };
        let class = match (exponent, fraction) {
            (1.., _) if !integer => Class::Unsupported,
            (0, 0) if !integer => Class::Zero,
            (0, _) => Class::Denormal,
            (e, 0) if e == format.top_exponent() => Class::Infinite,
            (e, f) if e == format.top_exponent() && f >> (width - 1) != 0 => Class::Quiet,
            (e, _) if e == format.top_exponent() => Class::Signaling,
            _ => Class::Normal,
        };
        let is_number = !matches!(class, Class::Quiet | Class::Signaling | Class::Unsupported);
        let real = match format {
            _ if !is_number => Real::NAN,
            Format::Half => widen(Half::from_bits(bits)),
            Format::Single => widen(Single::from_bits(bits)),
            Format::Double => widen(Double::from_bits(bits)),
            Format::Extended => widen(X87DoubleExtended::from_bits(bits)),
        };
        let negative = bits >> (at + format.exponent_bits()) & 1 != 0;
        let significand = u64::from(integer) << 63 | fraction << (63 - width);
        Self { format, class, negative, significand, real }
    }

    pub fn is_nan(&self) -> bool {
        matches!(self.class, Class::Quiet | Class::Signaling)
    }
    pub fn is(&self, class: Class) -> bool {
        self.class == class
    }
    pub fn is_zero(&self) -> bool {
        self.is(Class::Zero)
    }
    pub fn is_infinite(&self) -> bool {
        self.is(Class::Infinite)
    }
    /// This NaN as a quiet NaN of `format`.
    pub fn quieted(&self, format: Format) -> u128 {
        format.nan(self.negative, self.significand & !(1 << 63))
    }
}
