//! From the bytes of a page to a translated superblock.
//!
//! A superblock goes on behind conditional branches that are not taken, ends at every other branch, and never
//! leaves its page.

use crate::emit::{Emitter, Finished};
use crate::engine::{Block, Engine};
use crate::liveness::{self, Flags};
use crate::plan::{self, Plan};
use cpu_soft::SoftCore;
use cpu_soft::translate::Place;
use x86_decode::{Decoded, FlowControl, Instruction, Mnemonic, decode};
use x86_defs::Exception;
use x86_defs::flags::STATUS;
use x86_emulate::lower::{self, LowerContext};
use x86_emulate::{Op, integer, vector, x87};

/// Longest superblock.
pub const MAX_INSTRUCTIONS: usize = 96;
const MAX_BRANCHES: usize = 8;
const PAGE: usize = 4096;

/// One instruction on its way.
pub struct Item {
    /// Decoded at its offset from the block's start.
    pub insn: Instruction,
    /// Its bytes.
    raw: [u8; 15],
    /// How it is emitted.
    pub plan: Plan,
    /// What the interpreter would run.
    pub op: Op<SoftCore>,
    /// The handler may look at the x87 unit or change it.
    pub sees_x87: bool,
    /// Flags that matter behind it (for a branch: where it is not taken).
    pub live_after: Flags,
    /// Flags that matter where a branch leads.
    pub live_target: Flags,
}

impl Item {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.raw[..self.insn.len()]
    }
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
}

/// Translates the code at `place`. `None`: its first instruction does not fit the page, as may happen if somebody just
/// changed it.
pub fn translate(engine: &mut Engine, core: &SoftCore, place: &Place, context: u8) -> Option<Block> {
    let mut page = Box::new([0; PAGE]);
    core.ram().load_bytes(place.at & !0xFFF, &mut page[..]);
    let source = read(engine, place, &engine.host(context), page);
    // Nothing would count down in such a block.
    if source.items.is_empty() && source.closing.is_none() {
        return None;
    }
    let base = engine.memory.next();
    let mut emitter = Emitter::new(base, place, core.cpu.mmu_index, context, engine);
    emitter.block(&source);
    let Finished { code, block, .. } = emitter.finish();
    engine.memory.append(&code);
    Some(block)
}

/// Decodes and plans the code at `place` in `page`.
pub fn read(engine: &Engine, place: &Place, host: &plan::Host, page: Box<[u8; PAGE]>) -> Source {
    let first = place.at as usize & (PAGE - 1);
    let bytes = &page[first..];
    let ctx = |at: u16| LowerContext { mode: place.mode, features: engine.features, at, live_flags: STATUS };
    let mut items: Vec<Item> = Vec::new();
    let (mut at, mut branches) = (0usize, 0);
    let mut closing = None;
    while items.len() < MAX_INSTRUCTIONS {
        let insn = match decode(&bytes[at..], 64, at as u64, engine.features) {
            Decoded::Instruction(insn) => insn,
            Decoded::NeedMore => break,
            Decoded::Invalid => {
                closing = Some(lower::raising(Exception::InvalidOpcode, &ctx(at as u16)));
                break;
            }
            Decoded::TooLong => {
                closing = Some(lower::raising(Exception::GeneralProtection, &ctx(at as u16)));
                break;
            }
        };
        let (op, pure) = lowered(&insn, &ctx(at as u16));
        let raw = &bytes[at..at + insn.len()];
        let plan = match pure {
            true => match plan::plan(&insn, raw, &ctx(at as u16), host) {
                Plan::Call if insn.mnemonic() == Mnemonic::Fldcw => Plan::Barrier,
                plan => plan,
            },
            false if is_fence(&insn) => Plan::Copy,
            false => Plan::Barrier,
        };
        let mut copy = [0; 15];
        copy[..raw.len()].copy_from_slice(raw);
        let (live_after, live_target) = (liveness::ALL, liveness::ALL);
        let sees_x87 = !pure || integer::lower::<SoftCore>(&insn, &ctx(at as u16)).is_none();
        items.push(Item { insn, raw: copy, plan, op, sees_x87, live_after, live_target });
        at += insn.len();
        if matches!(plan, Plan::Barrier) {
            break;
        }
        match insn.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch if branches < MAX_BRANCHES => branches += 1,
            _ => break,
        }
    }
    let mut source = Source { items, end: at as u16, live_end: liveness::ALL, closing, page };
    find_live(&mut source, first as u64, engine);
    source
}

/// The interpreter's operation, and whether it leaves modes, mappings and vector state alone.
fn lowered(insn: &Instruction, ctx: &LowerContext) -> (Op<SoftCore>, bool) {
    let pure =
        integer::lower(insn, ctx).or_else(|| vector::lower(insn, ctx)).or_else(|| x87::lower(insn, ctx));
    match pure {
        // The families are asked in the interpreter's order; one of the system's comes before some of these.
        Some(_) if x86_emulate::system::lower::<SoftCore>(insn, ctx).is_some() => {
            (lower::lower(insn, ctx), false)
        }
        Some(op) => (op, !loads_masks(insn)),
        None => (lower::lower(insn, ctx), false),
    }
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

fn is_fence(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence)
}

/// Fills in which flags matter behind each instruction.
fn find_live(source: &mut Source, first: u64, engine: &Engine) {
    let ahead = |page: &[u8], offset: u64| {
        let at = first.wrapping_add(offset);
        if at < PAGE as u64 { liveness::at(page, at, engine.features) } else { liveness::ALL }
    };
    let last_falls = source.items.last().is_some_and(|i| falls_through(&i.plan));
    if source.closing.is_none() && last_falls {
        source.live_end = ahead(&source.page[..], u64::from(source.end));
    }
    let mut live = source.live_end;
    for i in (0..source.items.len()).rev() {
        let item = &mut source.items[i];
        item.live_after = live;
        live = match item.plan {
            Plan::Jcc(_) | Plan::Jmp | Plan::Call64 => {
                item.live_target = ahead(&source.page[..], item.insn.near_branch_target());
                let not_taken = if matches!(item.plan, Plan::Jcc(_)) { live } else { 0 };
                item.live_target | not_taken | liveness::effect(&item.insn).0
            }
            Plan::Call | Plan::Barrier => liveness::ALL,
            Plan::Ret(_) | Plan::Indirect(_) => liveness::ALL,
            _ => liveness::before(&item.insn, live),
        };
    }
}

/// Whether the instruction behind is reached from this one.
pub fn falls_through(plan: &Plan) -> bool {
    !matches!(plan, Plan::Barrier | Plan::Jmp | Plan::Call64 | Plan::Ret(_) | Plan::Indirect(_))
}
