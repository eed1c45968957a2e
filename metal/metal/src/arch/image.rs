//! Where our own image lies: the symbols of `link.ld` and `boot.s`.

use core::ops::Range;

/// Parts of the image, as addresses.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Everything.
    pub all: Range<u64>,
    /// Code.
    pub text: Range<u64>,
    /// Constants.
    pub constants: Range<u64>,
    /// The page below the boot processor's stack, which is not to be mapped.
    pub guard: Range<u64>,
    /// The boot processor's stack.
    pub stack: Range<u64>,
}

#[cfg(target_os = "none")]
unsafe extern "C" {
    static __image_start: u8;
    static __text_end: u8;
    static __constants_end: u8;
    static __image_end: u8;
    static boot_stack_guard: u8;
    static boot_stack_top: u8;
}

/// The image that runs.
#[cfg(target_os = "none")]
pub fn image() -> Image {
    let at = |symbol: *const u8| symbol.addr() as u64;
    let (start, text, constants) =
        (at(&raw const __image_start), at(&raw const __text_end), at(&raw const __constants_end));
    let (end, guard, top) =
        (at(&raw const __image_end), at(&raw const boot_stack_guard), at(&raw const boot_stack_top));
    Image {
        all: start..end,
        text: start..text,
        constants: text..constants,
        guard: guard..guard + 4096,
        stack: guard + 4096..top,
    }
}

/// On a host there is none.
#[cfg(not(target_os = "none"))]
pub fn image() -> Image {
    Image::default()
}

/// The caller's frame pointer and the return address in the frame at `frame`, if that is on a processor's stack.
pub fn stack_frame(frame: u64) -> Option<(u64, u64)> {
    let stack = super::processors::stack_of(frame).unwrap_or(image().stack);
    let fits = frame.is_multiple_of(8) && frame >= stack.start && frame < stack.end.saturating_sub(16);
    fits.then(|| {
        let at = core::ptr::with_exposed_provenance::<u64>(frame as usize);
        // SAFETY: both words lie on the stack, which is mapped and holds plain integers.
        unsafe { (at.read_volatile(), at.add(1).read_volatile()) }
    })
}
