"""The words of the synthetic world: what its item texts are about, and the sentences around it.

`TOPICS` gives each topic ten groups of five phrases. Groups of one topic share no word, so counting words learnt from
one group says nothing about another; their common meaning does. Phrases are plurals or mass nouns, so that they fit
every template; templates are about no topic.
"""

_TOPICS = {
    "cooking": """
        sourdough loaves, puff pastry, cinnamon rolls, oven temperatures, bread flour
        slow braises, chicken stock, beef stew, casserole dishes, simmering pots
        stir-fries, wok techniques, soy marinades, noodles, sesame oil
        salad dressings, vinaigrettes, roasted vegetables, chopped herbs, lemon zest
        knife skills, mincing garlic, diced onions, kitchen scales, measuring spoons
        curries, toasted spices, basmati rice, lentil dal, turmeric
        grilled steaks, barbecue sauce, smoked brisket, charcoal grills, spice rubs
        homemade pasta, ravioli, tomato ragu, parmesan, risotto
        omelettes, poached eggs, pancake batter, breakfast hash, maple syrup
        pickles, fermented cabbage, jam jars, canning, chutneys""",
    "astronomy": """
        telescopes, refractor lenses, eyepieces, stargazing nights, dark skies
        galaxies, spiral arms, Milky Way maps, redshift, cosmic distances
        black holes, event horizons, gravitational waves, neutron stars, pulsars
        Jupiter's moons, Saturn's rings, gas giants, planetary orbits, Neptune
        comets, meteor showers, asteroids, Oort cloud debris, falling fireballs
        lunar eclipses, crater shadows, full moonlight, tidal locking, solar coronas
        exoplanets, transit surveys, habitable zones, alien atmospheres, red dwarfs
        nebulae, supernova remnants, stellar nurseries, interstellar dust, white dwarf cooling
        space probes, Mars rovers, rocket launches, astronauts, orbiting laboratories
        constellations, Orion, zodiac signs, Polaris, celestial charts""",
    "football": """
        penalty kicks, goalkeepers, diving saves, shoot-outs, spot kick nerves
        midfield passing, pressing tactics, formations, counter-attacks, ball possession
        strikers, hat-tricks, headed goals, finishing drills, top scorers
        World Cup fixtures, qualifying groups, international squads, knockout rounds, host countries
        transfer windows, club signings, player contracts, release clauses, loan deals
        referees, offside calls, yellow cards, video assistant reviews, handball rules
        full-backs, sliding tackles, man marking, defensive lines, clean sheets
        derby matches, terrace chants, stadium crowds, rival supporters, season tickets
        league tables, relegation battles, promotion play-offs, title races, points deductions
        youth academies, dribbling exercises, scouting, head coaches, training pitches""",
    "gardening": """
        tomato seedlings, seed trays, potting soil, greenhouse shelves, germination
        rose pruning, shrubs, hedge trimming, secateurs, climbing flowers
        compost heaps, worm bins, leaf mould, organic mulch, kitchen scraps
        raised beds, vegetable plots, carrot rows, crop rotation, runner beans
        lawn care, mowing, turf, grass weeds, aeration
        aphids, slugs, ladybirds, natural pest control, blight
        spring bulbs, tulips, daffodils, autumn planting, border displays
        fruit trees, apple grafting, orchards, cherry blossom, strawberry runners
        houseplants, ferns, succulents, repotting, indoor watering
        wildflower meadows, bee-friendly blooms, native perennials, lavender, butterfly habitats""",
    "personal finance": """
        index funds, stock markets, dividends, investment portfolios, brokerage fees
        mortgages, fixed interest rates, home loans, down payments, refinancing
        household budgets, monthly spending, expense tracking, grocery bills, frugal habits
        pensions, retirement plans, annuities, compound growth, early retirees
        credit cards, debt repayment, overdrafts, borrowing costs, credit scores
        tax returns, deductions, income brackets, capital gains, filing deadlines
        savings accounts, emergency cash, bank deposits, rainy-day money, piggy banks
        life insurance, premiums, protection, insured risks, claims
        government bonds, inflation, treasury yields, monetary policy, bond ladders
        wills, estate lawyers, inheritance, trusts, beneficiaries""",
    "parenting": """
        newborn sleep, night feeds, swaddling, cribs, baby monitors
        toddler tantrums, potty training, time-outs, two-year-olds, picky eaters
        homework routines, school runs, parents' evenings, report cards, packed lunches
        teenagers, curfews, screen limits, moody adolescents, growing independence
        breastfeeding, infant formula, weaning, bottles, first solid foods
        sibling rivalry, sharing toys, jealous brothers, big sisters, family meetings
        bedtime stories, picture books, lullabies, nap schedules, cuddly bears
        day care, nannies, maternity leave, working mothers, nursery places
        pregnancy, birth plans, midwives, antenatal classes, expectant couples
        playdates, playground friends, childhood shyness, birthday parties, make-believe games""",
    "jazz": """
        saxophone solos, bebop, Charlie Parker, improvisation, altered chords
        big bands, swing rhythms, Duke Ellington, brass sections, dance halls
        trumpet mutes, Miles Davis, cool modal tunes, late-night clubs, ballads
        jazz piano, stride playing, Thelonious Monk, left-hand voicings, keyboard trios
        double bass lines, walking basslines, plucked strings, Charles Mingus, upright players
        drum brushes, ride cymbals, syncopation, Art Blakey, hard bop
        scat singing, Ella Fitzgerald, torch songs, vocal phrasing, Billie Holiday
        New Orleans parades, Dixieland, clarinets, Louis Armstrong, ragtime
        bossa nova, Latin percussion, samba guitar, Stan Getz, Afro-Cuban beats
        fusion records, electric keys, funk grooves, Herbie Hancock, synthesizers""",
    "hiking": """
        mountain trails, summit views, switchbacks, alpine passes, steep ascents
        backpacks, trekking poles, walking boots, waterproof jackets, lightweight gear
        camping stoves, tents, sleeping bags, campfires, overnight pitches
        topographic maps, compasses, waymarks, route finding, grid references
        national parks, canyon rims, desert walks, ranger stations, geysers
        coastal paths, sea cliffs, dune crossings, tidal causeways, beach rambles
        blisters, wilderness first aid, altitude sickness, dehydration, sprained ankles
        forest loops, woodland tracks, creek fords, waterfalls, mossy valleys
        long-distance footpaths, thru-hikers, Appalachian Trail stages, resupply stops, pilgrim ways
        bear encounters, wildlife spotting, snow shoes, avalanche safety, winter treks""",
    "home repair": """
        leaky taps, pipe fittings, plumbing, blocked drains, toilet cisterns
        power drills, wall plugs, screws, spirit levels, shelf brackets
        paint rollers, primer coats, interior decorating, masking tape, wallpaper stripping
        roof tiles, gutters, attic insulation, damp patches, chimney flashing
        bathroom grout, ceramic tiling, silicone sealant, shower trays, adhesive mortar
        circuit breakers, rewiring, light switches, sockets, fuse boxes
        hardwood floors, sanding, varnish, squeaky boards, laminate planks
        sash windows, double glazing, draught strips, door hinges, jammed locks
        plasterboard, skim plaster, ceiling cracks, joint compound, stud partitions
        boilers, radiators, central heating, thermostats, furnace filters""",
    "video games": """
        role-playing quests, character builds, dungeon crawls, experience points, skill trees
        first-person shooters, multiplayer lobbies, headshots, aim training, battle royales
        consoles, controllers, Nintendo launches, handheld screens, PlayStation exclusives
        speedruns, glitches, frame-perfect tricks, leaderboards, retro cartridges
        indie developers, pixel art, level design, game engines, early access
        strategy titles, base building, resource management, turn-based combat, tech research
        esports tournaments, streamers, Twitch channels, pro gamers, prize pools
        platformers, double jumps, boss fights, Super Mario, side-scrolling stages
        virtual reality headsets, motion tracking, graphics cards, ray tracing, smooth visuals
        sandbox worlds, Minecraft, crafting recipes, open-world exploration, user-made mods""",
    "fashion": """
        evening gowns, haute couture, runway shows, Paris designers, silk dresses
        sneakers, streetwear, hoodies, limited drops, baseball caps
        tailored suits, neckties, lapels, cufflinks, dress shirts
        denim jeans, jacket patches, indigo dye, vintage washes, selvedge hems
        handbags, leather purses, designer logos, clutch straps, luxury labels
        capsule wardrobes, closet edits, neutral colours, layering basics, outfit planning
        high heels, ankle boots, ballet flats, loafers, stilettos
        thrift shops, second-hand clothing, upcycled garments, sustainable fabrics, slow style
        earrings, necklaces, silver bracelets, statement jewellery, gemstone rings
        knitwear, cashmere jumpers, wool coats, winter scarves, chunky cardigans""",
    "cars": """
        electric vehicles, charging stations, battery range, regenerative braking, Tesla models
        engine oil changes, spark plugs, air filters, mechanics, garage servicing
        sports coupes, turbochargers, horsepower, lap times, zero-to-sixty sprints
        used hatchbacks, mileage, test drives, dealership haggling, resale values
        tyre pressure, alloy wheels, brake pads, suspension, winter treads
        classic convertibles, chrome bumpers, barn finds, restored bodywork, Ford Mustangs
        Formula One, pit stops, grand prix circuits, Ferrari drivers, pole positions
        family SUVs, boot space, child seat anchors, all-wheel transmission, crossover trims
        hybrid sedans, fuel economy, petrol prices, exhaust emissions, diesel motors
        self-driving software, lane assistance, parking sensors, dashboard cameras, autopilot modes""",
}

TOPICS: dict[str, tuple[tuple[str, ...], ...]] = {
    topic: tuple(tuple(line.strip().split(", ")) for line in groups.strip().splitlines())
    for topic, groups in _TOPICS.items()
}
"""Topic name -> groups of phrases."""

TITLES = (
    "All about {0}", "Notes on {0}", "A fresh look at {0}", "Getting started with {0}", "The trouble with {0}",
    "In praise of {0}", "Rethinking {0}", "Your questions on {0}", "What nobody tells you about {0}",
    "A short course in {0}", "The case for {0}", "Making sense of {0}", "Lessons from {0}", "Another word on {0}",
)  # fmt: skip
"""Each takes one phrase."""

OPENINGS = (
    "This piece explains how {0} and {1} belong together, one step at a time.",
    "Our writer spent a month with {0} and came back with plenty to say about {1}.",
    "If you have ever wondered about {0}, start here, then read on for {1}.",
    "We asked three experts for their best advice on {0} and, of course, on {1}.",
    "From {0} to {1}, here is what matters and what you can safely ignore.",
    "Readers keep writing to us about {0}, so we took a careful look, with {1} in mind.",
    "There is more to {0} than most people think, and much of it comes down to {1}.",
    "A practical introduction to {0}, with a long detour through {1}.",
    "Few things divide opinion like {0}, unless you bring up {1}.",
    "Half memoir and half manual, this is a story about {0} and {1}.",
    "Forget what you have heard about {0}: the real surprise lies in {1}.",
    "We compared the old wisdom on {0} with the latest thinking on {1}.",
)
"""Each takes two phrases of the main topic."""

MIDDLES = (
    "It also covers {0} and lists the mistakes that beginners make.",
    "A separate section deals with {0}, with examples and pictures.",
    "You will find clear answers about {0} and a checklist to keep.",
    "Along the way it gives some honest opinions on {0}.",
    "The part on {0} alone is worth your time.",
    "Expect strong views on {0} and a few jokes.",
    "It closes with a frank discussion of {0}.",
    "Do not skip the paragraph on {0}.",
    "Later it turns to {0}, where the details count.",
    "There are useful numbers on {0} as well.",
)
"""Each takes one phrase of the main topic."""

ASIDES = (
    "Fans of {0} will enjoy the aside on {1}.",
    "Oddly enough, it ends up talking about {0} and {1}.",
    "A bonus chapter moves on to {0} and even {1}.",
    "It draws a clever parallel with {0}, and with {1}.",
    "The second half is really about {0} and {1}.",
    "There is something in it about {0} and {1}, too.",
)
"""Each takes two phrases of an item's second topic."""

ENDINGS = (
    "Short, friendly and easy to follow.",
    "Bring a cup of tea and take your time.",
    "Suitable for newcomers and old hands alike.",
    "Updated this year after many comments.",
    "One of the pieces that people send to their friends.",
    "No previous knowledge is needed.",
    "It is longer than usual, but it never drags.",
    "Read it twice.",
)
"""For items of one topic; no phrase."""
