# What `cargo xtask metal costs` does in the laboratory. Before it stand QEMU=, BENCH=, FIRST= and MODEL=.
#
#   CONTENDER name      what follows is its
#   TSC ticks           before the VMM starts; then at its guest's first word
#   EXIT-COST ...       by the guest

# Everything in RAM: no wait for the host is counted.
dd if=/dev/zero of=/tmp/disk.raw bs=1024k count=1 2>/dev/null
# QEMU first: its guest's first word is what power-on is counted to.
echo "CONTENDER qemu"
$FIRST < /dev/null
"$QEMU" -M q35 -accel kvm -cpu host -nodefaults -no-user-config -display none -no-reboot -m 64 -serial stdio \
    -device isa-debug-exit,iobase=0xf4,iosize=4 -drive file=/tmp/disk.raw,if=none,format=raw,id=disk \
    -device virtio-blk-pci,drive=disk -kernel "$BENCH" < /dev/null | $FIRST
cp "$(readlink -f /lab/bedplate)" /tmp/bedplate
# The first run on a kernel finds out what its KVM can do.
/tmp/bedplate run --engine kvm --cpu-model "$MODEL" --kernel "$BENCH" --memory 64M < /dev/null > /dev/null
echo "CONTENDER bedplate"
$FIRST < /dev/null
/tmp/bedplate run --engine kvm --cpu-model "$MODEL" --kernel "$BENCH" --memory 64M --disk /tmp/disk.raw,format=raw \
    < /dev/null | $FIRST
true
