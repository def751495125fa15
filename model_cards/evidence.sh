#!/usr/bin/env bash
# All results, step by step; each prints its numbers, and none is done twice.
#
#     WORK=evidence LIMIT=540 bash model_cards/evidence.sh backbone speed train:0
#
# WORK is a folder with novels.tar.xz and babi-v1.2.tar.xz; everything is written there. After LIMIT seconds what runs is
# ended; the same command goes on from there (the training of the backbone starts again). Steps, in their order:
#
#     backbone         the backbone, for BACKBONE_MINUTES (default 4)
#     speed            tokens a second at 1, 8 and 32 segments
#     train:SEED       qa1 by its recipe: its stages are the gates
#     evaluate:RUN     qa1 to 128k, SAMPLES each (default 1000; RUN is qa1-SEED, or uncorrected-SEED)
#     long:RUN         qa1 to 1M, the same, under CONTROLS (default "off swapped deleted"; more can be added later)
#     join:NAME        results-NAME-0, -1 and -2 as results-NAME, all seeds in one figure
#     uncorrected:SEED, carried:SEED    by budget.yaml: with correction off, and with states carried instead of A
#     measure:SEED     what the carried states recall, to 128k
#     novels, tokens   language modelling with memory, and with tokens carried
#     losses           both on the test side
#     remember:SEED, rewrite:SEED           associative retrieval
#     remember-off:SEED, rewrite-off:SEED   with correction off
#     rewrite-long:SEED                     goes on from rewrite:SEED, after pairs written before
#     remember-50:SEED                      goes on from remember:SEED, with at most 50 pairs
#     pairs:NAME       what all seeds of NAME, one of these six, recall
#     near-keys        which pairs remember-SEED and remember-50-SEED get wrong
#     health:RUN       the memories of qa1-SEED over 20,000 segments, of rewrite-SEED over 100,000
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python}
armt() { limited "$PYTHON" -W ignore -m modeling_armt.conversion "$@"; }
python() { limited "$PYTHON" -W ignore "$@"; }
limited() {
    local left=$((LIMIT - SECONDS))
    ((left > 0)) || { echo "no time left" >&2; exit 75; }
    timeout --kill-after 5 "$left" "$@"
}
LIMIT=${LIMIT:-36000}
QA1=(--task babilong --task-option task=qa1 --task-option babi=babi-v1.2.tar.xz --task-option background=novels.tar.xz
    --task-option cache=background-cache)
TEXT=(--task-option source=novels.tar.xz)
cd "${WORK:?name the folder of the data}"

convert() { # NAME [OPTION...]
    [ -d "$1" ] || armt convert backbone --out "$1" --num-mem-tokens 16 --d-mem 64 "${@:2}"
}
stages() { # RUN: the gates
    "$PYTHON" - "$1" <<'END'
import json, sys
training = json.load(open(f"{sys.argv[1]}/training.json"))
for stage in training["stages"]:
    size = f"{stage['segments']} segments in novels" if stage["segments"] else "facts alone"
    size += f" (of {stage['segment_size']} tokens)" if stage["segment_size"] else ""
    if stage["pairs"]:
        size = f"{stage['pairs']} pairs, {stage['task_options']}"
    print(f"{sys.argv[1]}: {size}: score {stage['score']:.3f} after {stage['steps']} steps, {stage['seconds']:.0f} s")
print(f"{sys.argv[1]}: {training['tokens'] / 1e6:,.0f}M tokens, {training['tokens_per_s']:,.0f} tokens/s")
END
}

join() { # NAME: results of several seeds as those of one command
    python - "results-$1" results-"$1"-[0-9] <<'END'
import json, sys
from pathlib import Path
from modeling_armt.conversion.evaluation.plots import plot_results
out, *folders = map(Path, sys.argv[1:])

def asked(results):
    lengths = [(entry["length"], entry["controls"]) for run in results["runs"] for entry in run["lengths"]]
    return results["request"], lengths

first, *others = (json.loads((folder / "results.json").read_text()) for folder in folders)
expected = asked(first)
for other in others:
    if asked(other) != expected:
        sys.exit(f"{folders} are results of different commands")
    first["runs"] += other["runs"]
    first["environment"]["command"] += " && " + other["environment"]["command"]
out.mkdir()
(out / "results.json").write_text(json.dumps(first, indent=1) + "\n")
plot_results(first, out)
END
}

for step in "$@"; do
    name=${step%%:*} of=${step#*:}
    began=$SECONDS
    echo "== $step"
    case $name in
    backbone)
        [ -d backbone ] || python "$HERE/backbone/make_backbone.py" --novels novels.tar.xz --babi babi-v1.2.tar.xz \
            --cache background-cache --out backbone --minutes "${BACKBONE_MINUTES:-4}" ${BACKBONE_OPTIONS:-}
        ;;
    speed)
        convert qa1-base-0 --segment-size 512
        [ -f speed.json ] || python "$HERE/speed.py" --recipe "$HERE/babilong/qa1.yaml" --model qa1-base-0 --out speed.json
        ;;
    train)
        convert "qa1-base-$of" --segment-size 512 --seed "$of"
        [ -d "qa1-$of" ] || armt train "qa1-base-$of" --recipe "${RECIPE:-$HERE/babilong/qa1.yaml}" --seed "$of" \
            --out "qa1-$of" --resume
        stages "qa1-$of"
        ;;
    join)
        [ -d "results-$of" ] || join "$of"
        ;;
    uncorrected)
        convert "uncorrected-base-$of" --segment-size 512 --seed "$of" --no-correction
        [ -d "uncorrected-$of" ] || armt train "uncorrected-base-$of" --seed "$of" --out "uncorrected-$of" --resume \
            --recipe "${RECIPE:-$HERE/babilong/budget.yaml}"
        stages "uncorrected-$of"
        ;;
    carried)
        convert "qa1-base-$of" --segment-size 512 --seed "$of"
        [ -d "carried-$of" ] || python "$HERE/carried.py" train --carry states --model "qa1-base-$of" --seed "$of" \
            --recipe "${RECIPE:-$HERE/babilong/budget.yaml}" --out "carried-$of" --resume
        stages "carried-$of"
        ;;
    evaluate)
        case $of in uncorrected*) some=0k,1k,4k,16k,64k,128k ;; *) some=0k,1k,4k,8k,16k,32k,64k,128k ;; esac
        armt evaluate "$of" "${QA1[@]}" --lengths "${LENGTHS:-$some}" \
            --samples "${SAMPLES:-1000}" ${CONTROLS:+--controls $CONTROLS} --compile --out "results-$of"
        ;;
    long)
        armt evaluate "$of" "${QA1[@]}" --lengths "${LENGTHS:-500k,1M}" --samples "${SAMPLES:-1000}" \
            --controls ${CONTROLS:-off swapped deleted} --compile --out "results-long-$of"
        ;;
    measure)
        [ -d "results-carried-$of" ] || python "$HERE/carried.py" evaluate "carried-$of" "${QA1[@]}" \
            --lengths "${LENGTHS:-0k,1k,4k,16k,64k,128k}" --samples "${SAMPLES:-1000}" --out "results-carried-$of"
        ;;
    novels)
        convert novels-base --segment-size 128
        [ -d novels ] || armt train --recipe "${TEXT_RECIPE:-$HERE/text/novels.yaml}" --out novels --resume
        ;;
    tokens)
        convert novels-base --segment-size 128
        [ -d tokens ] || python "$HERE/carried.py" train --carry tokens --out tokens --resume \
            --recipe "${TEXT_RECIPE:-$HERE/text/novels.yaml}"
        ;;
    losses)
        armt evaluate novels --task text "${TEXT[@]}" --lengths "${LENGTHS:-1024,2048}" ${SAMPLES:+--samples $SAMPLES} \
            --out results-novels
        python "$HERE/text/compare.py" novels tokens "${TEXT[@]}" --length 1024 ${SAMPLES:+--samples $SAMPLES} \
            --out results-novels/compare.json
        ;;
    remember | rewrite | remember-off | rewrite-off)
        kind=${name%-off}
        [ -d "$name-base-$of" ] || python "$HERE/associative_retrieval/make_backbone.py" --out "$name-base-$of" \
            --seed "$of" --key-size "$([ $kind = remember ] && echo 3 || echo 1)" \
            $([ $kind = $name ] || echo --no-correction)
        [ -d "$name-$of" ] || armt train "$name-base-$of" --recipe "$HERE/associative_retrieval/$kind.yaml" \
            --seed "$of" --out "$name-$of" --resume
        stages "$name-$of"
        ;;
    rewrite-long | remember-50)
        [ -d "$name-$of" ] || armt train "${name%-*}-$of" --recipe "$HERE/associative_retrieval/${name/-/_}.yaml" \
            --seed "$of" --out "$name-$of" --resume
        stages "$name-$of"
        ;;
    pairs)
        case $of in
        remember*) retrieval=(--task-option key_size=3 --lengths "${LENGTHS:-10p,20p,50p,100p,200p,400p}") ;;
        *) retrieval=(--task-option rewrite=true --lengths "${LENGTHS:-10p,20p,50p,100p,200p,500p,1kp,2kp,5kp,10kp}") ;;
        esac
        armt evaluate "$of"-[0-9] --task associative_retrieval "${retrieval[@]}" --samples "${SAMPLES:-1000}" \
            ${CONTROLS:+--controls $CONTROLS} ${COMPILE:+--compile} --out "${OUT_PAIRS:-results-$of}"
        ;;
    near-keys)
        [ -f near-keys.json ] || python "$HERE/associative_retrieval/near_keys.py" remember-[0-9] remember-50-[0-9] \
            --out near-keys.json
        ;;
    health)
        case $of in
        rewrite*) retrieval=(--task associative_retrieval --segments 100000) ;;
        *) retrieval=("${QA1[@]}" --segments 20000 --compile) ;;
        esac
        [ -d "health-$of" ] || python "$HERE/health.py" "$of" "${retrieval[@]}" --out "health-$of"
        ;;
    *)
        echo "there is no step $step" >&2
        exit 2
        ;;
    esac
    echo "== $step: $((SECONDS - began)) s"
done
