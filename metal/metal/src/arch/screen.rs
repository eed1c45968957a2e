//! The screen, for last words: the framebuffer that the loader handed over, otherwise the text screen of a PC, 80 × 25
//! characters at 0xB8000. On a machine without one the writes go nowhere.

use crate::screen::{CELL, Cells, Framebuffer, is_bright};
use core::fmt::{Arguments, Write};
use spin::Once;

const TEXT: usize = 0xB_8000;
const TEXT_CELLS: (usize, usize) = (80, 25);
/// White on red.
const ATTRIBUTE: u16 = 0x4F00;
const WHITE: u32 = 0x00FF_FFFF;

static FRAMEBUFFER: Once<Framebuffer> = Once::new();

/// From now on [`show`] uses a framebuffer.
///
/// # Safety
/// It is mapped, for ever, and nothing else is there.
pub unsafe fn set_framebuffer(framebuffer: Framebuffer) {
    FRAMEBUFFER.call_once(|| framebuffer);
}

/// Clears the screen and shows `text`.
pub fn show(text: Arguments<'_>) {
    // A screen never refuses.
    let _ = match FRAMEBUFFER.get() {
        Some(framebuffer) => {
            clear(framebuffer);
            Cells::new(framebuffer.cells(), |cell, byte| draw(framebuffer, cell, byte)).write_fmt(text)
        }
        None => Cells::new(TEXT_CELLS, put).write_fmt(text),
    };
}

fn put(cell: usize, byte: u8) {
    let at = (TEXT as *mut u16).wrapping_add(cell);
    // SAFETY: the legacy video window is mapped and no RAM of ours; cells are inside of it.
    unsafe { at.write_volatile(ATTRIBUTE | u16::from(byte)) };
}

fn set_pixel(framebuffer: &Framebuffer, x: u32, y: u32, colour: u32) {
    let at = core::ptr::with_exposed_provenance_mut::<u32>(framebuffer.pixel(x, y) as usize);
    // SAFETY: a pixel of the framebuffer, which whoever set it vouched for.
    unsafe { at.write_volatile(colour) };
}

fn clear(framebuffer: &Framebuffer) {
    for y in 0..framebuffer.height {
        (0..framebuffer.width).for_each(|x| set_pixel(framebuffer, x, y, 0));
    }
}

/// A blank is left as [`clear`] leaves it.
fn draw(framebuffer: &Framebuffer, cell: usize, byte: u8) {
    let (columns, _) = framebuffer.cells();
    let (left, top) = ((cell % columns) as u32 * CELL, (cell / columns) as u32 * CELL);
    for (x, y) in (0..CELL * CELL).map(|n| (n % CELL, n / CELL)) {
        if is_bright(byte, x, y) {
            set_pixel(framebuffer, left + x, top + y, WHITE);
        }
    }
}
