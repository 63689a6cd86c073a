# Drafts from code rows, one store per codec, three seeds (6 codecs: 9 min).
codecs=${CODED:-exact,klt-1-1-2,klt-0.75-1-2,klt-0.6-1-2,rotated-2-4,rotated-4-4}
lim dump 200 python3 klt_stores.py --dump --model "$W/smol" --data "$W/corpus.jsonl.gz" \
	--stores "$W/code" --out "$R" --codecs "$codecs" --only reasoning-gym-codeio --rows 9000 --at-once 3
lim train "${LIMIT:-460}" python3 klt_stores.py --name a --model "$W/smol" --stores "$W/code" \
	--out "$R" --codecs "$codecs" --seeds 0,1,2 --steps 600 --seconds "${LIMIT:-440}"
lim merge 30 python3 klt_stores.py --merge --out "$R"
