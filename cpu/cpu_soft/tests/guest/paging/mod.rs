//! Paging (SDM vol. 3, chapter 4).

mod crossing;
mod matrix;
mod tlb;
