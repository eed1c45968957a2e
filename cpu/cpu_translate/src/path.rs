//! Which way a superblock takes through its page, and how far it goes.
//!
//! It goes on behind conditional branches, or where these were mostly taken to, follows direct jumps and calls and the returns of
//! these, goes through short loops more than once, ends at every other branch, and never leaves its page. Offsets are
//! from the start of the page.

use crate::block::{Item, PAGE};
use crate::feedback::KnownWay;
use crate::plan::Plan;
use cpu_soft::translate::{Heat, Place};
use x86_decode::{FlowControl, Instruction};

/// Longest superblock.
pub const MAX_INSTRUCTIONS: usize = 96;
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
pub struct Path<'a> {
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
    pub fn new(first: u64, checks_itself: bool, heat: &'a Heat<'a>, ways: &Ways<'a>) -> Self {
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
            knows: ways.renewed.clone().map(|known| (known, 0, 0)),
            way: 0,
            is_long: false,
        }
    }

    /// Whether it may go on behind `items` instructions.
    pub fn has_room(&self, items: usize) -> bool {
        items < self.extent.instructions
    }

    /// See `Source::is_long`.
    pub fn is_long(&self, items: usize) -> bool {
        items > LUKEWARM.instructions || self.is_long
    }

    /// See `Source::way`.
    pub fn known_way(&self) -> u16 {
        self.way | 2 << self.branches
    }

    /// Where it goes on behind `item`, which `before` others precede; `None`: it ends there.
    pub fn next(&mut self, item: &Item, before: usize) -> Option<u64> {
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
    pub fn expected(&self, item: &Item, before: usize) -> Option<u64> {
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
