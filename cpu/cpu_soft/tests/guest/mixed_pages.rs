//! Random programs that write beside their own code and into it, over and over: what comes out is computed here, too.

use crate::harness::*;

/// Functions are in a page of their own.
const FUNCTIONS: u64 = CODE + 0x1000;
const FUNCTION_BYTES: u64 = 0x20;
/// Words of data in each of both pages.
const WORDS: u64 = 0xC00;
const COUNT: u64 = 8;
/// Rounds of the program.
const ROUNDS: u32 = 150;

/// What a program does, one instruction (or three) each.
#[derive(Clone, Copy)]
enum Act {
    /// ADD RBX, IMM32: the immediate is one of the patched ones.
    Add(usize),
    /// ADD to the immediate of the `Add` with that number, of so many bytes.
    Patch(usize, u8, u32),
    /// ADD to a word of data in the page of the program (0) or of the functions (1).
    Data(u64, u64, u32),
    /// Calls a function, which adds its immediate to RBX and goes back.
    Call(u64),
    /// ADD to a function's immediate.
    PatchFunction(u64, u32),
    /// ROL RBX, n
    Rotate(u8),
    /// ADC RBX, 0 behind ADD RBX, RBX: flags live across nothing that writes.
    Carry,
    /// A word of data to RBX.
    Load(u64, u64),
}

struct Model {
    rbx: u64,
    adds: Vec<u32>,
    functions: [u32; COUNT as usize],
    data: [[u32; COUNT as usize]; 2],
}

impl Model {
    fn act(&mut self, act: Act) {
        let signed = |v: u32| v as i32 as u64;
        match act {
            Act::Add(n) => self.rbx = self.rbx.wrapping_add(signed(self.adds[n])),
            Act::Patch(n, bytes, by) => {
                let mask = if bytes == 4 { u32::MAX } else { (1 << (bytes * 8)) - 1 };
                let old = self.adds[n];
                self.adds[n] = old & !mask | old.wrapping_add(by) & mask;
            }
            Act::Data(page, n, by) => {
                let word = &mut self.data[page as usize][n as usize];
                *word = word.wrapping_add(by);
            }
            Act::Call(n) => self.rbx = self.rbx.wrapping_add(signed(self.functions[n as usize])),
            Act::PatchFunction(n, by) => {
                let old = &mut self.functions[n as usize];
                *old = old.wrapping_add(by);
            }
            Act::Rotate(n) => self.rbx = self.rbx.rotate_left(n.into()),
            Act::Carry => self.rbx = self.rbx.rotate_left(1),
            Act::Load(page, n) => {
                self.rbx = self.rbx.wrapping_add(self.data[page as usize][n as usize].into());
            }
        }
    }
}

fn random(r: &mut Random) -> Vec<Act> {
    let count = 4 + r.below(30) as usize;
    let small = |r: &mut Random| r.next() as u32 >> (r.below(4) * 8);
    (0..count)
        .map(|n| match r.below(9) {
            // Each is there once: the number of the act.
            0..=2 => Act::Add(n),
            3 => Act::Patch(usize::MAX, r.pick(&[1, 2, 4]), small(r)),
            4 => Act::Data(r.below(2), r.below(COUNT), small(r)),
            5 => Act::Call(r.below(COUNT)),
            6 if r.one_in(3) => Act::PatchFunction(r.below(COUNT), small(r)),
            6 => Act::Load(r.below(2), r.below(COUNT)),
            7 => Act::Rotate(1 + r.below(62) as u8),
            _ => Act::Carry,
        })
        .collect()
}

/// Bytes of an act; `immediates` are the addresses of the `Add`s' immediates.
fn bytes(act: Act, at: u64, immediates: &[u64]) -> Vec<u8> {
    let absolute = |head: &[u8], to: u64, by: &[u8]| {
        let mut v = head.to_vec();
        v.extend((to as u32).to_le_bytes());
        v.extend(by);
        v
    };
    let word = |page: u64, n: u64| CODE + page * 0x1000 + WORDS + n * 8;
    let immediate = |n: u64| FUNCTIONS + n * FUNCTION_BYTES + 3;
    match act {
        Act::Add(_) => vec![0x48, 0x81, 0xC3, 0, 0, 0, 0],
        Act::Patch(n, 1, by) => absolute(&[0x80, 0x04, 0x25], immediates[n], &[by as u8]),
        Act::Patch(n, 2, by) => absolute(&[0x66, 0x81, 0x04, 0x25], immediates[n], &by.to_le_bytes()[..2]),
        Act::Patch(n, _, by) => absolute(&[0x81, 0x04, 0x25], immediates[n], &by.to_le_bytes()),
        Act::Data(page, n, by) => absolute(&[0x81, 0x04, 0x25], word(page, n), &by.to_le_bytes()),
        Act::Call(n) => {
            let to = (FUNCTIONS + n * FUNCTION_BYTES).wrapping_sub(at + 5) as u32;
            [&[0xE8][..], &to.to_le_bytes()].concat()
        }
        Act::PatchFunction(n, by) => absolute(&[0x81, 0x04, 0x25], immediate(n), &by.to_le_bytes()),
        Act::Rotate(n) => vec![0x48, 0xC1, 0xC3, n],
        Act::Carry => vec![0x48, 0x01, 0xDB, 0x48, 0x83, 0xD3, 0],
        Act::Load(page, n) => {
            [absolute(&[0x8B, 0x04, 0x25], word(page, n), &[]), vec![0x48, 0x01, 0xC3]].concat()
        }
    }
}

/// The program's bytes at `CODE`: ECX rounds, then HLT.
fn assemble(acts: &[Act]) -> Vec<u8> {
    let none = vec![0; acts.len()];
    let mut at = CODE;
    let places: Vec<u64> = acts
        .iter()
        .map(|act| {
            at += bytes(*act, at, &none).len() as u64;
            at - 4
        })
        .collect();
    let mut code = Vec::new();
    for act in acts {
        code.extend(bytes(*act, CODE + code.len() as u64, &places));
    }
    code.extend([0xFF, 0xC9, 0x0F, 0x85]); // dec ecx; jnz
    let back = (code.len() as u32 + 4).wrapping_neg();
    code.extend(back.to_le_bytes());
    code.push(0xF4);
    code
}

fn run(seed: u64) {
    let r = &mut Random(seed);
    let mut acts = random(r);
    let adds: Vec<usize> = (0..acts.len()).filter(|n| matches!(acts[*n], Act::Add(_))).collect();
    for act in &mut acts {
        if let Act::Patch(n, ..) = act {
            match adds.is_empty() {
                true => *act = Act::Carry,
                false => *n = r.pick(&adds),
            }
        }
    }
    let mut g = Guest::long();
    // Sometimes the stack is in one of the pages, too.
    let stack = r.pick(&[STACK, CODE + 0xF00, FUNCTIONS + 0xF00]);
    g.edit(|s| (s.gpr[1], s.gpr[3], s.gpr[4]) = (ROUNDS.into(), 0, stack));
    g.put(CODE, &assemble(&acts));
    for n in 0..COUNT {
        g.put(FUNCTIONS + n * FUNCTION_BYTES, &[0x48, 0x81, 0xC3, 0, 0, 0, 0, 0xC3]);
    }
    let mut model = Model {
        rbx: 0,
        adds: vec![0; acts.len()],
        functions: [0; COUNT as usize],
        data: [[0; COUNT as usize]; 2],
    };
    for _ in 0..ROUNDS {
        acts.iter().for_each(|act| model.act(*act));
    }
    let s = g.run_to_halt();
    assert_eq!((s.gpr[3], s.gpr[1]), (model.rbx, 0), "seed {seed}");
    for (page, words) in model.data.iter().enumerate() {
        for (n, word) in words.iter().enumerate() {
            let at = CODE + page as u64 * 0x1000 + WORDS + n as u64 * 8;
            assert_eq!(g.get32(at), *word, "seed {seed}");
        }
    }
}

#[test]
fn random_programs_that_write_beside_and_into_their_code() {
    (0..150).for_each(run);
}

/// Every page of RAM that can be is code and data: more of them than are remembered.
#[test]
fn all_pages_are_code_and_data() {
    let mut g = Guest::long();
    const FROM: u64 = 0x20_0000;
    const PAGES: u64 = 480;
    for n in 0..PAGES {
        // inc dword [rsi + 0x800]; ret
        g.put(FROM + n * 0x1000, &[0xFF, 0x86, 0, 8, 0, 0, 0xC3]);
    }
    g.edit(|s| s.gpr[2] = 100);
    // again: mov esi, FROM; mov ecx, PAGES; page: call rsi; add esi, 0x1000; dec ecx; jnz page; dec edx; jnz again; hlt
    let mut code = vec![0xBE, 0, 0, 0x20, 0, 0xB9];
    code.extend((PAGES as u32).to_le_bytes());
    code.extend([
        0xFF, 0xD6, 0x81, 0xC6, 0, 0x10, 0, 0, 0xFF, 0xC9, 0x75, 0xF4, 0xFF, 0xCA, 0x75, 0xE6, 0xF4,
    ]);
    g.put(CODE, &code);
    g.run_to_halt();
    assert!((0..PAGES).all(|n| g.get32(FROM + n * 0x1000 + 0x800) == 100));
}
