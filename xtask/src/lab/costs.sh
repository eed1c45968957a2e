# What `cargo xtask lab costs` does in the laboratory. Before it stand QEMU=, PAYLOAD=, IDLE=, MODEL= and ROUNDS=.
#
#   CONTENDER name                  what follows is its
#   COST operation count ticks      by the payload
#   START ns                        processor time of the VMM to its guest's first instruction
#   MEMORY own files rams           resident KiB of its own, and of its program and libraries, which every further VM
#                                   shares; both without guest RAM; mappings that are guest RAM

MEMORY_MIB=256
# Everything in RAM: no wait for the host is counted.
cp "$(readlink -f /lab/bedplate)" /tmp/bedplate
dd if=/dev/zero of=/tmp/disk.raw bs=1024k count=1 2>/dev/null
mkdir /tmp/groups
mount -t cgroup2 groups /tmp/groups

# vmm NAME KERNEL [MORE]: becomes that VMM.
vmm() {
    name=$1 kernel=$2
    shift 2
    common="-accel kvm -cpu host -nodefaults -no-user-config -display none -no-reboot -m $MEMORY_MIB -serial stdio"
    common="$common -drive file=/tmp/disk.raw,if=none,format=raw,id=disk"
    case $name in
    bedplate)
        exec /tmp/bedplate run --engine kvm --cpu-model "$MODEL" --kernel "$kernel" --memory "${MEMORY_MIB}M" \
            --disk /tmp/disk.raw,format=raw --on-reset stop
        ;;
    qemu-q35) exec "$QEMU" -M q35 $common -device virtio-blk-pci,drive=disk -kernel "$kernel" "$@" ;;
    qemu-microvm)
        exec "$QEMU" -M microvm $common -global virtio-mmio.force-legacy=false -device virtio-blk-device,drive=disk \
            -kernel "$kernel" "$@"
        ;;
    esac
}

# start NAME [MORE]: a guest that halts at once, or a VMM told to wait before it.
start() {
    group=/tmp/groups/$1-$round
    mkdir "$group"
    (
        echo 0 > "$group/cgroup.procs"
        vmm "$1" "$IDLE" $2
    ) < /dev/null > /dev/null &
    vmm=$!
    sleep 5
    echo "START $(awk '/^usage_usec/ { print $2 * 1000 }' "$group/cpu.stat")"
    awk -v ram=$((MEMORY_MIB * 1024)) '
        /^Size:/ { guest = $2 >= ram; rams += guest }
        /^Rss:/ && !guest { all += $2 }
        /^Anonymous:/ && !guest { own += $2 }
        END { print "MEMORY", own, all - own, rams }' "/proc/$vmm/smaps"
    kill "$vmm"
    wait "$vmm"
}

for round in $(seq "$ROUNDS"); do
    for name in bedplate qemu-q35 qemu-microvm; do
        echo "CONTENDER $name"
        case $name in
        bedplate) start $name ;;
        # -S: QEMU is ready and has not run the guest.
        *) start $name -S ;;
        esac
        (vmm $name "$PAYLOAD") < /dev/null
    done
done
# What the VMMs ended with says nothing: each ends by a triple fault.
true
