//! What is shown on a screen: text in cells, and the pixels of a cell where the loader hands over a framebuffer.
//!
//! Called by: [`crate::start`] (what the loader's command line tells), [`crate::arch::screen`] and `xtask`'s tests. No
//! memory is touched here, so that this runs on any host.

use core::fmt::Write;
use core::ops::Range;

/// Width and height of a character in pixels: a font of 8 × 8, each point twice in both directions.
pub const CELL: u32 = 16;
/// What the loader's command line calls it.
const WORD: &str = "screen=";
const MAX_SIDE: u32 = 1 << 14;

/// A screen of pixels of 32 bits. We write black and white only, which all orders of colours have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framebuffer {
    /// Physical address of the first pixel.
    pub start: u64,
    /// Pixels in a line.
    pub width: u32,
    /// Lines.
    pub height: u32,
    /// Pixels from line to line.
    pub stride: u32,
}

impl Framebuffer {
    /// From `screen=START,WIDTH,HEIGHT,STRIDE` in the loader's command line, in decimal; `None`: there is none that can be.
    pub fn parse(command_line: &str) -> Option<Self> {
        let words = command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix(WORD))?;
        let mut numbers = words.split(',').map(|number| number.parse::<u64>().ok());
        let mut next = || numbers.next().flatten();
        let start = next()?;
        let mut side =
            || next().and_then(|n| u32::try_from(n).ok()).filter(|n| (CELL..=MAX_SIDE).contains(n));
        let found = Self { start, width: side()?, height: side()?, stride: side()? };
        let fits = found.stride >= found.width && start.is_multiple_of(4) && start > 0;
        (fits && start.checked_add(found.bytes()).is_some()).then_some(found)
    }

    fn bytes(&self) -> u64 {
        u64::from(self.stride) * u64::from(self.height) * 4
    }

    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.bytes()
    }

    /// Characters in a line, and lines.
    pub fn cells(&self) -> (usize, usize) {
        ((self.width / CELL) as usize, (self.height / CELL) as usize)
    }

    /// Address of a pixel.
    pub fn pixel(&self, x: u32, y: u32) -> u64 {
        self.start + 4 * (u64::from(y) * u64::from(self.stride) + u64::from(x))
    }
}

/// Whether a pixel of a character's cell is bright.
pub fn is_bright(character: u8, x: u32, y: u32) -> bool {
    let glyph = font8x8::legacy::BASIC_LEGACY.get(usize::from(character));
    let row = glyph.and_then(|glyph| glyph.get(y as usize / 2)).copied().unwrap_or(0);
    row >> (x / 2) & 1 != 0
}

/// Writes text into cells of `columns`, `rows`, line by line; what does not fit is left out.
pub struct Cells<F: FnMut(usize, u8)> {
    columns: usize,
    rows: usize,
    at: usize,
    /// Sets a cell, by its number.
    set: F,
}

impl<F: FnMut(usize, u8)> Cells<F> {
    /// From the first cell on, once all are blank.
    pub fn new((columns, rows): (usize, usize), mut set: F) -> Self {
        (0..columns * rows).for_each(|cell| set(cell, b' '));
        Self { columns, rows, at: 0, set }
    }
}

impl<F: FnMut(usize, u8)> Write for Cells<F> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.at = self.at.next_multiple_of(self.columns.max(1));
            } else if self.at < self.columns * self.rows {
                (self.set)(self.at, if byte.is_ascii_graphic() { byte } else { b' ' });
                self.at += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_tells_of_a_screen() {
        let found = Framebuffer::parse("x screen=2147483648,1280,800,1344").unwrap();
        assert_eq!(found, Framebuffer { start: 1 << 31, width: 1280, height: 800, stride: 1344 });
        assert_eq!((found.cells(), found.pixel(1, 2)), ((80, 50), (1 << 31) + 4 * (2 * 1344 + 1)));
        assert_eq!(found.range().end, (1 << 31) + 1344 * 800 * 4);
        for odd in [
            "",
            "screen=",
            "screen=4096,1280,800",
            "screen=4096,1280,800,1279",
            "screen=4097,1280,800,1280",
            "screen=0,1280,800,1280",
            "screen=4096,1,800,1280",
            "screen=4096,4294967296,800,1280",
            "screen=4096,1280,99999,1280",
            "screen=18446744073709551612,1280,800,1280",
            "screen=-1,-1,-1,-1",
        ] {
            assert_eq!(Framebuffer::parse(odd), None, "{odd}");
        }
    }

    #[test]
    fn text_wraps_and_ends_with_the_screen() {
        let mut all = [0; 12];
        let mut cells = Cells::new((4, 3), |cell, byte| all[cell] = byte);
        write!(cells, "ab\ncdefg\u{e9}\nhijklm").unwrap();
        assert_eq!(&all, b"ab  cdefg   ");
    }

    #[test]
    fn letters_have_their_shape() {
        let row = |y| {
            (0..CELL).map(|x| if is_bright(b'T', x, y) { '#' } else { '.' }).collect::<std::string::String>()
        };
        assert_eq!(row(0), "############....");
        assert_eq!(row(0), row(1));
        assert_eq!(row(15), "................");
        assert!(!is_bright(0xFF, 0, 0) && !is_bright(b' ', 3, 3));
    }
}
