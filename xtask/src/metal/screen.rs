//! The rows that look at the machine's screen: what is refused must stand there, too.

use std::fs;

use anyhow::{Context, Result, bail};
use guest_trials::Outcome;

use super::emulator::{Qemu, Step};
use super::rows::{PATIENCE, bundle_file};

/// What a damaged bundle is refused with.
const REFUSAL: &str = "bedplate-metal: the bundle is no cpio archive at byte 0";
/// The text screen: its first cells, white on red.
const TEXT: u32 = 0xB_8000;
const ATTRIBUTE: u16 = 0x4F;
/// Pixels of a cell's side on a screen of pixels, two for each point of the font.
const CELL: usize = 16;

/// Boots a damaged bundle, and asks QEMU's monitor when it has halted; what the monitor said.
fn refused(qemu: Qemu, command: &str) -> Result<String> {
    let bundle = Some(bundle_file("damaged.cpio", &[0x30; 5000])?);
    let more = ["-vga", "std"].map(String::from).into();
    let keys = format!("\x01c{command}\nquit\n");
    let halted = |log: &str| log.contains("HALTED");
    let steps = [Step { what: "the refusal", until: &halted, keys: &keys }];
    let (log, _) = Qemu { bundle, more, ends: false, ..qemu }.talk(PATIENCE, &steps)?;
    Ok(log)
}

/// The cells of the PC's text screen.
pub fn text(qemu: Qemu) -> Result<Outcome> {
    let log = refused(qemu, &format!("xp /{}hx {TEXT}", REFUSAL.len()))?;
    let cells = log.lines().filter_map(|line| line.trim().strip_prefix("00000000000b8"));
    let cells = cells.flat_map(|line| line.split_whitespace().skip(1));
    let cells: Vec<_> =
        cells.filter_map(|cell| u16::from_str_radix(cell.trim_start_matches("0x"), 16).ok()).collect();
    let expected: Vec<_> = REFUSAL.bytes().map(|byte| ATTRIBUTE << 8 | u16::from(byte)).collect();
    if cells != expected {
        bail!("the screen has {cells:x?}:\n{log}");
    }
    Ok(Outcome::Passed)
}

/// The pixels of the screen that firmware set up.
pub fn pixels(qemu: Qemu) -> Result<Outcome> {
    let dump = bundle_file("screen.ppm", b"")?;
    let log = refused(qemu, &format!("screendump {}", dump.display()))?;
    let image = fs::read(&dump).context("there is no picture of the screen")?;
    let seen = read_text(&image, REFUSAL.len()).with_context(|| log.clone())?;
    if seen != REFUSAL {
        bail!("the screen shows `{seen}` ({}):\n{log}", dump.display());
    }
    Ok(Outcome::Passed)
}

/// The first characters of a picture (PPM, binary) with white letters of the font on black; `?`: what is no letter.
fn read_text(image: &[u8], characters: usize) -> Result<String> {
    let mut parts = image.splitn(4, |byte| *byte == b'\n');
    let mut line = || parts.next().context("the picture is cut off");
    let (kind, size, _depth, pixels) = (line()?, line()?, line()?, line()?);
    let width = String::from_utf8_lossy(size).split(' ').next().and_then(|w| w.parse::<usize>().ok());
    let width = width.filter(|w| kind == b"P6" && *w >= CELL).context("odd picture")?;
    let bright = |cell: usize, x: usize, y: usize| {
        let columns = width / CELL;
        let (x, y) = (cell % columns * CELL + x, cell / columns * CELL + y);
        let at = (y * width + x) * 3;
        anyhow::Ok(pixels.get(at..at + 3).context("the picture is cut off")? == [0xFF; 3])
    };
    let mut text = String::new();
    for cell in 0..characters {
        let mut shape = [0u8; 8];
        for (x, y) in (0..CELL * CELL).map(|n| (n % CELL, n / CELL)) {
            // Of each two by two pixels the last; others must be as it is.
            if bright(cell, x, y)? != bright(cell, x | 1, y | 1)? {
                bail!("cell {cell} is no letter");
            }
            shape[y / 2] |= u8::from(bright(cell, x, y)?) << (x / 2);
        }
        let letter = (b' '..0x7F).find(|letter| font8x8::legacy::BASIC_LEGACY[usize::from(*letter)] == shape);
        text.push(char::from(letter.unwrap_or(b'?')));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_read() {
        let mut image = b"P6\n32 16\n255\n".to_vec();
        for (y, x) in (0..16).flat_map(|y| (0..32).map(move |x| (y, x))) {
            let letter = if x < 16 { b'H' } else { b'i' };
            let row = font8x8::legacy::BASIC_LEGACY[usize::from(letter)][y / 2];
            image.extend([if row >> (x % 16 / 2) & 1 != 0 { 0xFF } else { 0 }; 3]);
        }
        assert_eq!(read_text(&image, 2).unwrap(), "Hi");
        assert!(read_text(&image, 3).is_err() && read_text(&image[..50], 1).is_err());
        image[13] ^= 0xFF;
        assert!(read_text(&image, 1).is_err());
    }
}
