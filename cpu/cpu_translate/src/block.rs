//! From the bytes of a page to a translated superblock.
//!
//! It never leaves its page, and goes through it on a [`Path`]. Offsets are from the start of the page.

use crate::chain;
use crate::elide::{self, Member, Range};
use crate::emit::{Emitter, Finished};
use crate::engine::{Block, CAREFUL, Engine};
use crate::feedback::Guesses;
use crate::liveness::{self, Flags};
use crate::path::{Extent, Path, Ways};
use crate::plan::{self, Plan};
use cpu_soft::SoftCore;
use cpu_soft::translate::{Heat, Place};
use x86_decode::{Decoded, FlowControl, Instruction, MAX_LENGTH, Mnemonic, Reader, decode};
use x86_defs::Exception;
use x86_defs::control::CR4_SMAP;
use x86_defs::flags::STATUS;
use x86_emulate::lower::{self, LowerContext};
use x86_emulate::{Op, integer, vector, x87};

/// Most superblocks have no more.
const TYPICAL_INSTRUCTIONS: usize = 32;
pub const PAGE: usize = 4096;

/// One instruction on its way.
pub struct Item {
    /// Decoded at its offset in the page.
    pub insn: Instruction,
    /// Its bytes.
    raw: [u8; 15],
    /// How it is emitted.
    pub plan: Plan,
    /// What the interpreter would run.
    pub op: Op<SoftCore>,
    /// The handler may look at the x87 unit or change it.
    pub sees_x87: bool,
    /// For a branch: where the superblock goes on, if it does.
    pub follows: Option<u64>,
    /// For an indirect branch at the end: the linear address where it mostly leads.
    pub expected: Option<u64>,
    /// Flags that matter before it.
    pub live_before: Flags,
    /// Flags that matter where the superblock goes on.
    pub live_after: Flags,
    /// Flags that matter where a branch leads besides.
    pub live_target: Flags,
    /// The group that its memory operand belongs to.
    pub operand: Option<Member>,
    /// The group that its implied access to the stack belongs to.
    pub stack: Option<Member>,
    /// The address of its memory operand hangs on another load.
    pub chained: bool,
}

impl Item {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.raw[..self.insn.len()]
    }

    /// Its bytes in the next page.
    pub fn behind(&self) -> &[u8] {
        let first = PAGE.saturating_sub(self.insn.ip() as usize);
        self.bytes().get(first..).unwrap_or_default()
    }

    /// Whether the superblock can go on behind it.
    pub fn goes_on(&self) -> bool {
        match self.plan {
            Plan::Barrier | Plan::Indirect(_) | Plan::Syscall | Plan::Sysret => false,
            Plan::Jmp | Plan::CallDirect | Plan::Ret(_) => self.follows.is_some(),
            _ => true,
        }
    }

    /// Where a direct branch leads if not to where the superblock goes on.
    pub fn other_way(&self) -> Option<u64> {
        let (target, next) = (self.insn.near_branch_target(), self.insn.next_ip());
        match self.plan {
            Plan::Jcc(_) if self.follows == Some(target) => Some(next),
            Plan::Jcc(_) => Some(target),
            Plan::Jmp | Plan::CallDirect if self.follows.is_none() => Some(target),
            _ => None,
        }
    }
}

/// What SYSCALL finds: code for another state of these goes by the handler.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemCalls {
    /// Where it leads.
    pub entry: u64,
    /// CR4.SMAP.
    pub smap: bool,
}

/// What a superblock is made of.
pub struct Source {
    /// The instructions.
    pub items: Vec<Item>,
    /// Offset behind the last one.
    pub end: u16,
    /// Flags that matter there.
    pub live_end: Flags,
    /// Nothing can be executed behind the last one but by raising this.
    pub closing: Option<Op<SoftCore>>,
    /// The RAM page.
    pub page: Box<[u8; PAGE]>,
    /// The code compares its bytes when it is entered; it is one run of instructions then.
    pub checks_itself: bool,
    /// What the groups of memory accesses check.
    pub groups: Vec<Range>,
    /// What SYSCALL is translated for.
    pub system_calls: SystemCalls,
    /// Bits of the conditional branches that it follows, and one more behind the last.
    pub way: u16,
    /// It goes farther than one that is not hot would.
    pub is_long: bool,
}

/// Room for a [`Source`], kept from one to the next.
pub struct Scratch {
    /// The RAM page.
    pub page: Box<[u8; PAGE]>,
    items: Vec<Item>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { page: Box::new([0; PAGE]), items: Vec::with_capacity(TYPICAL_INSTRUCTIONS) }
    }
}

impl From<Source> for Scratch {
    fn from(Source { page, mut items, .. }: Source) -> Self {
        items.clear();
        Self { page, items }
    }
}

/// Translates the code at `place`; `key`: a context, perhaps [`CAREFUL`]; `hot`: with guesses (`feedback.rs`). `None`: there is nothing to guess, or its first instruction does not fit the page, as may happen if somebody just
/// changed it.
pub fn translate(
    engine: &mut Engine,
    core: &SoftCore,
    place: &Place,
    key: u8,
    heat: &Heat<'_>,
    hot: bool,
) -> Option<Block> {
    let mut scratch = engine.scratch.take().unwrap_or_default();
    core.ram().load_bytes(place.at & !0xFFF, &mut scratch.page[..]);
    let wide = place.mode.is_long();
    let next = (place.linear | (PAGE as u64 - 1)).wrapping_add(1);
    // 32-bit code does not go on behind 4 GiB.
    let inside = wide || next >> 32 == 0;
    let behind = core.known_place(next).filter(|_| inside).map(|next| {
        let mut bytes = [0; MAX_LENGTH];
        core.ram().load_bytes(next.at, &mut bytes);
        bytes
    });
    let name = (place.linear, place.at, key);
    let guesses = engine.feedback.begin(name, hot);
    let known = |offset: u64| {
        let page = |of: u64| of & !(PAGE as u64 - 1) | offset;
        engine.known_way(page(place.linear), page(place.at), key)
    };
    let renewed = engine.renewed.clone();
    // What was hot before its page was written still is.
    let extent = Extent::of(place, guesses.is_some());
    let ways = Ways { heat, known: &known, renewed, extent };
    let mut source = read(engine, place, &engine.host(key & !CAREFUL), scratch, behind.as_ref(), ways);
    elide::find_groups(&mut source, place.linear & !(PAGE as u64 - 1), wide, key & CAREFUL != 0);
    let (entry, smap) = (core.cpu.msrs.lstar, core.cpu.cr4 & CR4_SMAP != 0);
    source.system_calls = SystemCalls { entry, smap };
    // Nothing would count down in such a block.
    if source.items.is_empty() && source.closing.is_none() {
        return None;
    }
    if guesses.is_some() {
        chain::find_chains(&mut source.items);
        let guesses = |i: &Item| i.chained && i.operand.is_none_or(|m| m.first);
        let expects = source.items.iter().any(|i| i.expected.is_some() && i.follows.is_none());
        let same = engine.renewed.as_ref().is_some_and(|known| known.way == source.way);
        let same = same && !expects && !source.is_long;
        if same && !source.items.iter().any(guesses) {
            // It would be the same.
            engine.feedback.keep(name, Guesses::default(), source.items.len());
            return None;
        }
    }
    let base = engine.memory.next();
    let mut emitter = Emitter::new(base, place, core.cpu.mmu_index, key, engine);
    emitter.guesses = guesses;
    emitter.block(&source);
    let Finished { code, mut block, marks, guesses } = emitter.finish();
    if let Some(guesses) = guesses {
        engine.feedback.keep(name, guesses, source.items.len());
    }
    if let Some(journal) = &engine.journal {
        journal.note(place, &source, base, &code, &marks);
    }
    engine.memory.append(&code);
    block.way = source.way;
    engine.scratch = Some(source.into());
    Some(block)
}

/// Decodes and plans the code at `place` in `page`, along the way that it most likely takes.
/// `behind` is the beginning of the next page, if that can be executed.
pub fn read(
    engine: &Engine,
    place: &Place,
    host: &plan::Host,
    Scratch { page, mut items }: Scratch,
    behind: Option<&[u8; MAX_LENGTH]>,
    ways: Ways<'_>,
) -> Source {
    let first = place.at as usize & (PAGE - 1);
    let bits = place.mode.bitness();
    let ctx = |at: u16| LowerContext { mode: place.mode, features: engine.features, at, live_flags: STATUS };
    let heat = |offset: u64| (ways.heat)(place.at & !(PAGE as u64 - 1) | offset);
    let mut path = Path::new(first as u64, place.checks_itself, &heat, &ways);
    let mut at = first;
    let mut closing = None;
    let mut reader = Reader::new(&page[..], bits, 0, engine.features);
    while path.has_room(items.len()) {
        let mut both = [0; 2 * MAX_LENGTH];
        let mut bytes = &page[at..];
        let mut decoded = reader.at(at);
        if let (Decoded::NeedMore, Some(second), false) = (&decoded, behind, at == PAGE) {
            let first = bytes.len();
            both[..first].copy_from_slice(bytes);
            both[first..first + MAX_LENGTH].copy_from_slice(second);
            bytes = &both[..];
            decoded = decode(bytes, bits, at as u64, engine.features);
        }
        let insn = match decoded {
            Decoded::Instruction(insn) => insn,
            Decoded::NeedMore => break,
            Decoded::Invalid | Decoded::TooLong if place.checks_itself => break,
            Decoded::Invalid => {
                closing = Some(lower::raising(Exception::InvalidOpcode, &ctx(at as u16)));
                break;
            }
            Decoded::TooLong => {
                closing = Some(lower::raising(Exception::GeneralProtection, &ctx(at as u16)));
                break;
            }
        };
        let mut item = item(insn, &bytes[..insn.len()], &ctx(at as u16), host);
        if place.checks_itself && matches!(item.plan, Plan::Call) {
            item.plan = Plan::Barrier;
        }
        let next = path.next(&item, items.len());
        item.expected = path.expected(&item, items.len());
        item.follows = next.filter(|_| insn.flow_control() != FlowControl::Next);
        items.push(item);
        at = insn.next_ip() as usize;
        match next {
            Some(next) if next < PAGE as u64 => at = next as usize,
            Some(_) | None => break,
        }
    }
    if let Some(last) = items.last_mut().filter(|i| matches!(i.plan, Plan::Sti)) {
        last.plan = Plan::Barrier;
    }
    let (live_end, groups, system_calls) = (liveness::ALL, Vec::new(), SystemCalls::default());
    let (end, checks_itself) = (at as u16, place.checks_itself);
    let (way, is_long) = (path.known_way(), path.is_long(items.len()));
    let mut source =
        Source { items, end, live_end, closing, page, checks_itself, groups, system_calls, way, is_long };
    find_live(&mut source, bits, engine);
    source
}

fn item(insn: Instruction, bytes: &[u8], ctx: &LowerContext, host: &plan::Host) -> Item {
    let Lowered { op, pure, integer } = lowered(&insn, ctx);
    let plan = match pure {
        true => match plan::plan(&insn, bytes, ctx, host) {
            Plan::Call if insn.mnemonic() == Mnemonic::Fldcw => Plan::Barrier,
            Plan::Call => plan::system(&insn, ctx.mode).unwrap_or(Plan::Call),
            plan => plan,
        },
        false => plan::system(&insn, ctx.mode).unwrap_or(Plan::Barrier),
    };
    let mut raw = [0; 15];
    raw[..bytes.len()].copy_from_slice(bytes);
    let sees_x87 = match plan {
        Plan::Barrier | Plan::Syscall | Plan::Sysret => !pure || !integer,
        _ => pure && !integer,
    };
    let (live_after, live_target) = (liveness::ALL, liveness::ALL);
    Item {
        insn,
        raw,
        plan,
        op,
        sees_x87,
        follows: None,
        expected: None,
        live_before: liveness::ALL,
        live_after,
        live_target,
        operand: None,
        stack: None,
        chained: false,
    }
}

/// An instruction as the interpreter sees it.
struct Lowered {
    op: Op<SoftCore>,
    /// Leaves modes, mappings and vector state alone.
    pure: bool,
    /// Of the integer family.
    integer: bool,
}

fn lowered(insn: &Instruction, ctx: &LowerContext) -> Lowered {
    // The interpreter's order: the system's family comes before the vector and x87 families, and shares nothing with this.
    if let Some(op) = integer::lower(insn, ctx) {
        return Lowered { op, pure: true, integer: true };
    }
    let pure = match x86_emulate::system::lower::<SoftCore>(insn, ctx) {
        Some(_) => None,
        None => vector::lower(insn, ctx).or_else(|| x87::lower(insn, ctx)),
    };
    let (op, pure) = match pure {
        Some(op) => (op, !loads_masks(insn)),
        None => (lower::lower(insn, ctx), false),
    };
    Lowered { op, pure, integer: false }
}

/// The masks of MXCSR and of the x87 control word are a part of the context.
fn loads_masks(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Ldmxcsr
            | M::Vldmxcsr
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
            | M::Fninit
            | M::Fnclex
            | M::Fnsave
            | M::Frstor
            | M::Fldenv
            | M::Fnstenv
    )
}

/// Fills in which flags matter behind each instruction.
fn find_live(source: &mut Source, bits: u32, engine: &Engine) {
    // Code that is not compared may change.
    let known = !source.checks_itself;
    let mut reader = Reader::new(&source.page[..], bits, 0, engine.features);
    let mut ahead =
        |at: u64| if known && at < PAGE as u64 { liveness::at(&mut reader, at) } else { liveness::ALL };
    if source.closing.is_none() && source.items.last().is_some_and(Item::goes_on) {
        source.live_end = ahead(u64::from(source.end));
    }
    let mut live = source.live_end;
    for i in (0..source.items.len()).rev() {
        let item = &mut source.items[i];
        item.live_after = live;
        if let Some(other) = item.other_way() {
            item.live_target = ahead(other);
        }
        live = match item.plan {
            Plan::Jcc(_) => item.live_target | live | liveness::effect(&item.insn).0,
            Plan::Jmp | Plan::CallDirect if item.follows.is_some() => live,
            Plan::Jmp | Plan::CallDirect => item.live_target,
            Plan::Call | Plan::Barrier | Plan::Ret(_) | Plan::Indirect(_) => liveness::ALL,
            Plan::PushFlags | Plan::Syscall | Plan::Sysret => liveness::ALL,
            _ => liveness::before(&item.insn, live),
        };
        item.live_before = live;
    }
}
