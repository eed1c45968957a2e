//! From the bytes of a page to a translated superblock.
//!
//! A superblock goes on behind conditional branches, or where these were mostly taken to, follows direct jumps and calls and the returns of
//! these, goes through short loops more than once, ends at every other branch, and never leaves its page. Offsets are
//! from the start of the page.

use crate::chain;
use crate::elide::{self, Member, Range};
use crate::emit::{Emitter, Finished};
use crate::engine::{Block, CAREFUL, Engine};
use crate::feedback::{Guesses, KnownWay};
use crate::liveness::{self, Flags};
use crate::plan::{self, Plan};
use cpu_soft::SoftCore;
use cpu_soft::translate::{Heat, Place};
use x86_decode::{Decoded, FlowControl, Instruction, MAX_LENGTH, Mnemonic, decode};
use x86_defs::Exception;
use x86_defs::control::CR4_SMAP;
use x86_defs::flags::STATUS;
use x86_emulate::lower::{self, LowerContext};
use x86_emulate::{Op, integer, vector, x87};

/// Longest superblock.
pub const MAX_INSTRUCTIONS: usize = 96;
/// Most superblocks have no more.
const TYPICAL_INSTRUCTIONS: usize = 32;
const MAX_BRANCHES: usize = 12;
/// One that is not hot: it has less of what others have, too.
pub const LUKEWARM: Extent = Extent { instructions: 32, branches: 4, calls: 1 };
/// One that is.
pub const HOT: Extent = Extent { instructions: MAX_INSTRUCTIONS, branches: MAX_BRANCHES, calls: MAX_CALLS };
/// One that checks itself.
const CHECKED: Extent = Extent { instructions: 32, ..HOT };
/// Instructions behind a jump or call that is followed.
const MAX_FOLLOWED: usize = 40;
/// Calls that are followed at the same time.
const MAX_CALLS: usize = 4;
/// Times that a loop is gone through, and instructions that it may have then.
const MAX_TURNS: usize = 4;
const MAX_UNROLLED: usize = 48;
const PAGE: usize = 4096;
/// Times that the interpreter must have come to a branch for a guess where it leads.
const KNOWN: u32 = 8;

/// How far a superblock goes.
#[derive(Clone, Copy)]
pub struct Extent {
    instructions: usize,
    /// Conditional branches.
    branches: usize,
    /// Calls that are followed at the same time.
    calls: usize,
}

impl Extent {
    /// For `place`; `hot`: its code is hot.
    pub fn of(place: &Place, hot: bool) -> Self {
        if place.checks_itself {
            CHECKED
        } else if hot {
            HOT
        } else {
            LUKEWARM
        }
    }
}

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
    let mut page = Box::new([0; PAGE]);
    core.ram().load_bytes(place.at & !0xFFF, &mut page[..]);
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
    let mut source = read(engine, place, &engine.host(key & !CAREFUL), page, behind.as_ref(), ways);
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
    let Finished { code, block, marks, guesses } = emitter.finish();
    if let Some(guesses) = guesses {
        engine.feedback.keep(name, guesses, source.items.len());
    }
    if let Some(journal) = &engine.journal {
        journal.note(place, &source, base, &code, &marks);
    }
    engine.memory.append(&code);
    Some(Block { way: source.way, ..block })
}

/// Decodes and plans the code at `place` in `page`, along the way that it most likely takes.
/// `behind` is the beginning of the next page, if that can be executed.
pub fn read(
    engine: &Engine,
    place: &Place,
    host: &plan::Host,
    page: Box<[u8; PAGE]>,
    behind: Option<&[u8; MAX_LENGTH]>,
    ways: Ways<'_>,
) -> Source {
    let first = place.at as usize & (PAGE - 1);
    let bits = place.mode.bitness();
    let ctx = |at: u16| LowerContext { mode: place.mode, features: engine.features, at, live_flags: STATUS };
    let mut items: Vec<Item> = Vec::with_capacity(TYPICAL_INSTRUCTIONS);
    let heat = |offset: u64| (ways.heat)(place.at & !(PAGE as u64 - 1) | offset);
    let mut path = Path::new(first as u64, place.checks_itself, &heat, &ways);
    path.knows = ways.renewed.clone().map(|known| (known, 0, 0));
    let mut at = first;
    let mut closing = None;
    while items.len() < path.extent.instructions {
        let mut both = [0; 2 * MAX_LENGTH];
        let mut bytes = &page[at..];
        let mut decoded = decode(bytes, bits, at as u64, engine.features);
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
    let (way, is_long) = (path.known_way(), items.len() > LUKEWARM.instructions || path.is_long);
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

/// What is known of where branches lead.
pub struct Ways<'a> {
    /// How often the interpreter came to a place.
    pub heat: &'a Heat<'a>,
    /// The way of the translation at an offset in the page.
    pub known: &'a dyn Fn(u64) -> Option<KnownWay>,
    /// The way of the one that is translated anew.
    pub renewed: Option<KnownWay>,
    /// How far it may go.
    pub extent: Extent,
}

#[cfg(test)]
impl<'a> Ways<'a> {
    /// What the interpreter knows.
    pub fn counted(heat: &'a Heat<'a>, extent: Extent) -> Self {
        Self { heat, known: &|_| None, renewed: None, extent }
    }
}

/// The way of a superblock through its page.
struct Path<'a> {
    first: u64,
    /// Only straight on, and not behind what may change the code.
    checks_itself: bool,
    /// Start of the straight run under way.
    run: u64,
    /// How often the interpreter came to an offset.
    heat: &'a Heat<'a>,
    extent: Extent,
    branches: usize,
    /// The way of the translation at an offset in the page.
    known: &'a dyn Fn(u64) -> Option<KnownWay>,
    /// The one that this goes along, and how many branches and instructions were before it.
    knows: Option<(KnownWay, usize, usize)>,
    /// Bits of the branches that are followed.
    way: u16,
    /// It has more branches or calls than one that is not hot.
    is_long: bool,
    /// Times that it went back to its start.
    turns: usize,
    /// Return addresses of the calls that it followed.
    returns: Vec<u64>,
}

impl<'a> Path<'a> {
    fn new(first: u64, checks_itself: bool, heat: &'a Heat<'a>, ways: &Ways<'a>) -> Self {
        Self {
            first,
            checks_itself,
            run: first,
            heat,
            extent: ways.extent,
            branches: 0,
            turns: 0,
            returns: Vec::new(),
            known: ways.known,
            knows: None,
            way: 0,
            is_long: false,
        }
    }

    /// See `Source::way`.
    fn known_way(&self) -> u16 {
        self.way | 2 << self.branches
    }

    /// Where it goes on behind `item`, which `before` others precede; `None`: it ends there.
    fn next(&mut self, item: &Item, before: usize) -> Option<u64> {
        let next = self.way_on(item, before)?;
        if item.insn.flow_control() != FlowControl::Next {
            self.run = next;
        }
        Some(next)
    }

    fn way_on(&mut self, item: &Item, before: usize) -> Option<u64> {
        let insn = &item.insn;
        let inside = |target: u64| Some(target).filter(|t| *t < PAGE as u64);
        if self.checks_itself {
            let straight = matches!(item.plan, Plan::Jcc(_)) || insn.flow_control() == FlowControl::Next;
            let ends = !straight || matches!(item.plan, Plan::Barrier) || cpu_soft::may_change_code(insn);
            return (!ends).then_some(insn.next_ip());
        }
        match item.plan {
            Plan::Barrier | Plan::Indirect(_) | Plan::Syscall | Plan::Sysret => None,
            Plan::Jmp => {
                let target = inside(insn.near_branch_target())?;
                if target == self.first {
                    return self.turn(before);
                }
                self.duplicates(before);
                Some(target)
            }
            Plan::CallDirect => {
                let target =
                    inside(insn.near_branch_target()).filter(|_| self.returns.len() < self.extent.calls)?;
                self.duplicates(before);
                self.returns.push(insn.next_ip());
                self.is_long |= self.returns.len() > LUKEWARM.calls;
                Some(target)
            }
            Plan::Ret(0) => self.returns.pop().and_then(inside),
            Plan::Ret(_) => None,
            Plan::Jcc(_) if self.branches == self.extent.branches => None,
            Plan::Jcc(_) => {
                let next = self.branch(insn, before);
                self.is_long |= self.branches > LUKEWARM.branches;
                Some(next)
            }
            _ => Some(insn.next_ip()),
        }
    }

    /// Where an indirect branch mostly leads.
    fn expected(&self, item: &Item, before: usize) -> Option<u64> {
        let (known, _, items) = self.knows.as_ref()?;
        let done = (before + 1 - items) as u16;
        matches!(item.plan, Plan::Indirect(_) | Plan::Ret(_)).then(|| known.left.target(done))?
    }

    /// Where it goes on behind a conditional branch.
    fn branch(&mut self, insn: &Instruction, before: usize) -> u64 {
        self.branches += 1;
        let (target, behind) = (insn.near_branch_target(), insn.next_ip());
        let loops = target == self.first && self.may_turn(before);
        let mut taken = match &self.knows {
            // Hot code goes on where the known way ends.
            Some((known, branches, _)) if known.way >> (self.branches - branches + 1) != 0 => {
                loops || known.way >> (self.branches - branches) & 1 != 0
            }
            _ => loops || self.is_taken(insn),
        };
        if let Some((known, _, items)) = &self.knows
            && known.left.ends_at((before + 1 - items) as u16, if taken { behind } else { target })
            && (taken || target < PAGE as u64 && (target != self.first || loops))
        {
            // Most went the other way: on as from there.
            taken = !taken;
            let on = if taken { target } else { behind };
            self.knows = (self.known)(on).map(|known| (known, self.branches, before + 1));
            self.duplicates(before);
        }
        self.way |= u16::from(taken) << self.branches;
        self.turns += usize::from(taken && target == self.first);
        if taken { target } else { behind }
    }

    /// Whether a conditional branch forwards was mostly taken: the interpreter's blocks begin behind each branch.
    fn is_taken(&self, insn: &Instruction) -> bool {
        let (target, behind) = (insn.near_branch_target(), insn.next_ip());
        let came = (self.heat)(self.run);
        (behind..PAGE as u64).contains(&target) && came >= KNOWN && (self.heat)(behind) < came / 3
    }

    /// Once more through a loop, if it is short.
    fn turn(&mut self, before: usize) -> Option<u64> {
        let again = self.may_turn(before);
        self.turns += usize::from(again);
        again.then_some(self.first)
    }
    fn may_turn(&self, before: usize) -> bool {
        let whole = (before + 1) / (self.turns + 1);
        self.turns + 1 < MAX_TURNS && before + 1 + whole <= MAX_UNROLLED
    }

    /// Code behind may be in other superblocks, too: less of it.
    fn duplicates(&mut self, before: usize) {
        let most = &mut self.extent.instructions;
        *most = (*most).min(before + 1 + MAX_FOLLOWED);
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
    let integer = integer::lower(insn, ctx);
    let is_integer = integer.is_some();
    let pure = integer.or_else(|| vector::lower(insn, ctx)).or_else(|| x87::lower(insn, ctx));
    let (op, pure) = match pure {
        // The families are asked in the interpreter's order; one of the system's comes before some of these.
        Some(_) if x86_emulate::system::lower::<SoftCore>(insn, ctx).is_some() => {
            (lower::lower(insn, ctx), false)
        }
        Some(op) => (op, !loads_masks(insn)),
        None => (lower::lower(insn, ctx), false),
    };
    Lowered { op, pure, integer: is_integer }
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
    let ahead = |page: &[u8], at: u64| {
        if known && at < PAGE as u64 { liveness::at(page, bits, at, engine.features) } else { liveness::ALL }
    };
    if source.closing.is_none() && source.items.last().is_some_and(Item::goes_on) {
        source.live_end = ahead(&source.page[..], u64::from(source.end));
    }
    let mut live = source.live_end;
    for i in (0..source.items.len()).rev() {
        let item = &mut source.items[i];
        item.live_after = live;
        if let Some(other) = item.other_way() {
            item.live_target = ahead(&source.page[..], other);
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
